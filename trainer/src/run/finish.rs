//! After the last step: the evaluation on all held-out text, the export, the sample, and the summary for people.

use std::io::Write as _;

use parallel::progress::Stage;

use super::Run;
use super::folder::{Folder, Status, Summary};
use super::progress::duration;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::generate::{Sampling, generate, prompt_tokens};
use crate::state::sharding;
use crate::step::plain_model;

/// Finishes the run; false when somebody asked to stop before it was done, so that `--resume` finishes it.
pub(super) fn finish(run: &Run, folder: Option<&Folder>) -> Result<bool> {
    let held_out = match &run.data.held_out {
        Some(tokens) => {
            run.say("evaluating on all held-out text");
            match run.evaluate(0, &run.stop)? {
                Some(evaluation) => {
                    Some((evaluation.nats / std::f64::consts::LN_2 / tokens.text_bytes() as f64, tokens.text_bytes()))
                }
                None => return Ok(false),
            }
        }
        None => None,
    };
    run.stepper.progress().enter(Stage::Ending);
    // What is exported is what owners have; all others compute with replicas of it.
    let masters = match &run.group {
        Some(group) if run.recipe.export.at_end => {
            sharding::gather(&group.sums, run.stepper.plan().parameters(), &run.state)?
        }
        _ => None,
    };
    if let Some(group) = &run.group {
        group.say_goodbye();
    }
    let (Some(folder), Some(_)) = (folder, &run.metrics) else { return Ok(true) };
    if run.recipe.export.at_end {
        export(run, folder, masters.as_deref().unwrap_or(run.whole_weights()))?;
    }
    let mut summary = run.summary(Status::Done);
    summary.held_out_bits_per_byte = held_out.map(|(bits, _)| bits);
    folder.write_summary(&summary)?;

    report(run, folder, &summary, held_out);
    Ok(true)
}

/// Exports beside an export that is there already, and changes places with it only when the new one is whole.
fn export(run: &Run, folder: &Folder, weights: &[Vec<f32>]) -> Result<()> {
    let [place, next, old] = ["export", "export.next", "export.old"].map(|name| folder.file(name));
    for left_over in [&next, &old] {
        if left_over.exists() {
            std::fs::remove_dir_all(left_over).map_err(Error::io("remove", left_over))?;
        }
    }
    let export = Export {
        config: &run.config,
        weights,
        tokenizer: &run.data.tokenizer.json(),
        end_of_text: run.data.tokenizer.end_of_text_name(),
        end_of_text_id: run.data.tokenizer.end_of_text(),
        dtype: run.recipe.export.dtype,
    };
    export.write(&next)?;
    if place.exists() {
        std::fs::rename(&place, &old).map_err(Error::io("rename", &place))?;
    }
    std::fs::rename(&next, &place).map_err(Error::io("rename", &next))?;
    if old.exists() {
        std::fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
    }
    Ok(())
}

/// Says how it ended, on stdout. A closed stdout takes nothing away from the run, which is done.
fn report(run: &Run, folder: &Folder, summary: &Summary, held_out: Option<(f64, u64)>) {
    let print = |text: String| _ = writeln!(std::io::stdout(), "{text}");
    print(format!(
        "run {} is done: {} steps, {:.2} M tokens, {}; final loss {}",
        folder.name(),
        run.state.step,
        run.tokens as f64 / 1e6,
        duration(summary.wall_s),
        run.last_loss.map_or_else(|| "unknown".into(), |loss| format!("{loss:.4}"))
    ));
    if let Some((bits, bytes)) = held_out {
        // What zstd reaches is a comparison, not a result: without it the line is shorter.
        let zstd = run.data.held_out_zstd().ok().flatten();
        print(held_out_line(bits, bytes, zstd, run.recipe.train.seq_len));
    }
    if run.recipe.export.at_end {
        let dir = folder.file("export");
        print(format!("exported to {}; try: tributary generate {0} --prompt \"fn main\"", dir.display()));
    }
    if let Some(prompt) = &run.recipe.export.prompt {
        print(format!("a sample, after {prompt:?}:\n---"));
        match sample(run, prompt) {
            Ok(sample) => print(format!("{prompt}{sample}\n---")),
            Err(error) => run.say(&format!("there is no sample: {error}")),
        }
    }
}

fn sample(run: &Run, prompt: &str) -> Result<String> {
    let keys = &run.recipe.export;
    let model = plain_model(&run.config, &run.device, run.whole_weights());
    let sampling = Sampling { temperature: keys.temperature, top_p: 0.95, seed: run.recipe.train.seed };
    let longest = run.config.max_position_embeddings;
    let ids = prompt_tokens(&run.data.tokenizer, "export.prompt", prompt, longest)?;
    let mut sample = String::new();
    generate(&model, &run.data.tokenizer, ids, keys.sample_tokens, sampling, |text| {
        sample += text;
        Ok(())
    })?;
    Ok(sample)
}

fn held_out_line(bits: f64, bytes: u64, zstd: Option<f64>, seq_len: usize) -> String {
    let mut line = format!("held-out text ({:.2} MB): {bits:.3} bits per byte", bytes as f64 / 1e6);
    if let Some(zstd) = zstd {
        line += &format!(
            "\n  (zstd -19 reaches {zstd:.3} on the same text; that is not like for like: zstd packs it as one file and \
             may refer back to anything before, while the model predicts each window of {seq_len} tokens from that \
             window alone, but has learned from other text first, and its own size is not counted)"
        );
    }
    line
}
