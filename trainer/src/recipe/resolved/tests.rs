//! What a recipe means where it leaves something out.

use super::*;
use crate::recipe::raw;

#[test]
fn the_warm_up_of_a_sparse_codec_is_the_schedules_unless_it_is_written() {
    let text = "[model]\nfrom = 'a'\n[train]\nsteps = 90\nseq_len = 8\nmicro_batch_size = 2\n\
                [schedule]\nlearning_rate = 1\nwarmup_steps = 40\n[data]\nsource = 'text'\ntrain = ['a']\n";
    let warmup = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| format!("compression.{set}")).collect();
        let (raw, mut faults) = raw::read(text, &sets);
        let recipe = resolve(&raw, &mut faults).expect("all that is required");
        assert_eq!(faults, []);
        recipe.compression.warmup_steps
    };
    for (codec, expected) in
        [("sparse24-int8", 40), ("sparse24-int4", 40), ("int4", 0), ("int8", 0), ("fp32", 0), ("auto", 0)]
    {
        let codec = format!("codec={codec}");
        assert_eq!(warmup(&[&codec]), expected, "{codec}");
        // What is written counts, zero too.
        assert_eq!([0, 7].map(|steps| warmup(&[&codec, &format!("warmup_steps={steps}")])), [0, 7], "{codec}");
    }
    assert_eq!(warmup(&[]), 0);
}
