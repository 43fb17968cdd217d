//! Which codec a tensor's gradient travels in. It depends on the logical tensor alone, so that all ranks and all slices
//! of a tensor agree.

use compression::Codec;
use compression::cost::{Elements, int8_at_least};

use super::part::Part;
use super::plan::Parameter;

/// Tensors of fewer elements travel as `fp32`: they are a small part of the bytes and sensitive.
pub const SMALL_ELEMENTS: usize = 64 << 10;

/// What a tensor's kind allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Any codec.
    Any,
    /// `int8` where the codec has fewer bits: embeddings and the head, whose rows see few tokens of a step.
    Int8AtLeast,
    /// `fp32` always: vectors, routers, and what is small.
    Fp32,
}

/// What this parameter's kind allows.
#[must_use]
pub fn rule(parameter: &Parameter) -> Rule {
    let name = parameter.name.as_str();
    let routes = name.contains("router") || name.ends_with(".gate.weight");
    if parameter.shape.len() < 2 || parameter.elements() < SMALL_ELEMENTS || routes {
        Rule::Fp32
    } else if name.contains("embed_tokens") || name.contains("lm_head") {
        Rule::Int8AtLeast
    } else {
        Rule::Any
    }
}

/// The codec that a parameter's gradient travels in when `codec` is in force.
#[must_use]
pub fn codec_of(parameter: &Parameter, codec: Codec) -> Codec {
    match rule(parameter) {
        Rule::Any => codec,
        Rule::Int8AtLeast => int8_at_least(codec),
        Rule::Fp32 => Codec::Fp32,
    }
}

/// Whether there is a codec in which something of this parameter is left out, so that it may have residuals.
#[must_use]
pub fn may_be_lossy(parameter: &Parameter) -> bool {
    rule(parameter) != Rule::Fp32
}

/// Whether a step may leave rows of this parameter without a gradient: embeddings, whose rows are the step's tokens. The head is
/// treated alike, since it may share the embedding's table.
#[must_use]
pub fn may_leave_rows(parameter: &Parameter) -> bool {
    rule(parameter) == Rule::Int8AtLeast
}

/// How many elements of these parts travel under which rule.
#[must_use]
pub fn count<'a>(parts: impl IntoIterator<Item = &'a Part>) -> Elements {
    let mut elements = Elements::default();
    for part in parts {
        let count = match rule(&part.whole) {
            Rule::Any => &mut elements.any,
            Rule::Int8AtLeast => &mut elements.int8_at_least,
            Rule::Fp32 => &mut elements.fp32,
        };
        *count += part.region.len() as u64;
    }
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(name: &str, shape: &[usize]) -> Parameter {
        Parameter { name: name.into(), shape: shape.to_vec() }
    }

    #[test]
    fn the_rule_follows_name_and_shape() {
        use Codec::{Bf16, Fp32, Int4, Int8, Sparse24Int4, Sparse24Int8};
        let any = [Fp32, Bf16, Int8, Sparse24Int8, Int4, Sparse24Int4];
        let table = [Fp32, Bf16, Int8, Int8, Int8, Int8];
        for (name, shape, expected) in [
            ("model.layers.0.mlp.up_proj.weight", &[256, 256][..], any),
            ("model.layers.0.mlp.gate_proj.weight", &[256, 256], any),
            ("model.layers.0.mlp.up_proj.weight", &[256, 255], [Fp32; 6]),
            ("model.layers.0.input_layernorm.weight", &[1 << 20], [Fp32; 6]),
            ("model.layers.0.self_attn.q_proj.bias", &[1 << 20], [Fp32; 6]),
            ("model.layers.0.mlp.gate.weight", &[256, 4096], [Fp32; 6]),
            ("model.layers.0.mlp.router.weight", &[256, 4096], [Fp32; 6]),
            ("model.embed_tokens.weight", &[300, 256], table),
            ("lm_head.weight", &[300, 256], table),
            ("model.embed_tokens.weight", &[200, 256], [Fp32; 6]),
        ] {
            let parameter = parameter(name, shape);
            assert_eq!(Codec::ALL.map(|codec| codec_of(&parameter, codec)), expected, "{name} {shape:?}");
            assert_eq!(may_be_lossy(&parameter), expected[1] != Fp32, "{name} {shape:?}");
            assert_eq!(may_leave_rows(&parameter), expected == table, "{name} {shape:?}");
        }
    }

    #[test]
    fn every_element_is_counted_under_its_rule() {
        let parameters =
            [parameter("lm_head.weight", &[300, 256]), parameter("up", &[256, 512]), parameter("norm", &[256])];
        let parts = parameters.map(|parameter| Part::whole(parameter).expect("small"));
        assert_eq!(count(&parts), Elements { any: 256 * 512, int8_at_least: 300 * 256, fp32: 256 });
        // A slice goes the way of its tensor, however small it is.
        let slice = Part::slice(parameter("up", &[256, 512]), 1, 0..4).expect("inside");
        assert_eq!(count([&slice]), Elements { any: 1024, ..Elements::default() });
    }
}
