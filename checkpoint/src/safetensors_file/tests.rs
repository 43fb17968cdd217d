use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::SimulatedDisk;

const PATH: &str = "/file.safetensors";

fn written(entries: &[Entry<'_>], dtype: Dtype) -> Result<Vec<u8>, CheckpointError> {
    let disk = SimulatedDisk::new();
    let written = write(&disk, Path::new(PATH), entries, dtype, &[("format", "pt")])?;
    let bytes = disk.read(Path::new(PATH)).unwrap();
    assert_eq!(written.bytes, bytes.len() as u64);
    assert_eq!(written.blake3, blake3::hash(&bytes).to_hex().as_str());
    Ok(bytes)
}

#[test]
fn the_bytes_are_as_drawn() {
    let bytes = written(&[Entry { name: "a", shape: &[1, 2], values: &[1.0, -2.0] }], Dtype::F32).unwrap();
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}} "#;
    assert_eq!(header.len() % 8, 0);
    let mut expected = (header.len() as u64).to_le_bytes().to_vec();
    expected.extend_from_slice(header.as_bytes());
    expected.extend_from_slice(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
    assert_eq!(bytes, expected);
}

#[test]
fn halves_round_to_nearest_and_ties_to_even() {
    // 1 + 2^-8 lies midway between two bf16, 1 + 3 * 2^-8 too; the same for f16 with 2^-11.
    let check = |dtype, step: f32, expected: [u16; 4]| {
        let values = [1.0 + step, 1.0 + 3.0 * step, 1.0 + 1.5 * step, f32::INFINITY];
        let bytes = written(&[Entry { name: "a", shape: &[4], values: &values }], dtype).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let found: Vec<u16> = bytemuck::pod_collect_to_vec(file.tensor("a").unwrap().data());
        assert_eq!(found, expected, "{dtype}");
    };
    check(Dtype::Bf16, 1.0 / 256.0, [0x3f80, 0x3f82, 0x3f81, 0x7f80]);
    check(Dtype::F16, 1.0 / 2048.0, [0x3c00, 0x3c02, 0x3c01, 0x7c00]);
}

#[test]
fn what_cannot_be_written_is_named() {
    let check = |entries: &[Entry<'_>], dtype, expected: &str| {
        let message = written(entries, dtype).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let entry = |name, shape, values| Entry { name, shape, values };
    check(&[entry("a", &[3], &[0.0])], Dtype::F32, "tensor a: shape [3] has 3 elements, the slice has 1");
    check(&[entry("a", &[usize::MAX, 2], &[0.0])], Dtype::F32, "more elements than can be addressed");
    check(&[entry("a", &[1], &[0.0]); 2], Dtype::F32, "two tensors have it");
    check(&[entry("__metadata__", &[1], &[0.0])], Dtype::F32, "keep it for themselves");
    check(&[entry("a", &[1], &[1e6])], Dtype::F16, "1e6 is beyond the range of f16; export as f32 or bf16");
    check(&[entry("a", &[1], &[f32::MAX])], Dtype::Bf16, "is beyond the range of bf16; export as f32");
}

#[test]
fn type_names_lead_there_and_back() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
        assert_eq!(serde_json::to_string(&dtype).unwrap(), format!("\"{dtype}\""));
    }
    assert!("F32".parse::<Dtype>().unwrap_err().to_string().contains("f32, bf16, f16"));
}

proptest! {
    #[test]
    fn the_safetensors_crate_reads_what_we_write(
        tensors in prop::collection::btree_map("[a-zA-Z0-9_.\"é-]{1,12}", prop::collection::vec(0usize..5, 0..4), 0..6),
    ) {
        let data: Vec<Vec<f32>> = tensors.values().enumerate()
            .map(|(i, shape)| (0..shape.iter().product::<usize>()).map(|j| (i * 1000 + j) as f32).collect()).collect();
        let entries: Vec<Entry<'_>> = tensors.iter().zip(&data)
            .map(|((name, shape), values)| Entry { name, shape, values }).rev().collect();
        let bytes = written(&entries, Dtype::F32).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(file.len(), tensors.len());
        for ((name, shape), values) in tensors.iter().zip(&data) {
            let tensor = file.tensor(name).unwrap();
            prop_assert_eq!(tensor.shape(), &shape[..]);
            prop_assert_eq!(tensor.data(), bytemuck::cast_slice::<f32, u8>(values));
        }
    }
}
