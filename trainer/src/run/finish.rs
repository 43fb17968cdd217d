//! After the last step: the evaluation on all held-out text, the export, the sample, and the summary for people.

use std::io::Write as _;

use super::Run;
use super::folder::{Folder, Status, Summary};
use super::progress::duration;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::generate::{Sampling, generate};
use crate::step::plain_model;

/// Finishes the run; false when somebody asked to stop before it was done, so that `--resume` finishes it.
pub(super) fn finish(run: &Run, folder: &Folder) -> Result<bool> {
    let held_out = match &run.data.held_out {
        Some(tokens) => {
            run.progress.say("evaluating on all held-out text");
            match run.evaluate(0, &run.stop)? {
                Some(evaluation) => {
                    Some((evaluation.nats / std::f64::consts::LN_2 / tokens.text_bytes() as f64, tokens.text_bytes()))
                }
                None => return Ok(false),
            }
        }
        None => None,
    };
    let export = folder.file("export");
    if run.recipe.export.at_end {
        if export.exists() {
            // A run that was resumed after its end, with more steps: the export follows the weights.
            std::fs::remove_dir_all(&export).map_err(Error::io("replace", &export))?;
        }
        let written = Export {
            config: &run.config,
            weights: &run.state.weights,
            tokenizer: &run.data.tokenizer.json(),
            end_of_text: run.data.tokenizer.end_of_text_name(),
            end_of_text_id: run.data.tokenizer.end_of_text(),
            dtype: run.recipe.export.dtype,
        };
        written.write(&export)?;
    }
    let mut summary = run.summary(Status::Done);
    summary.held_out_bits_per_byte = held_out.map(|(bits, _)| bits);
    folder.write_summary(&summary)?;

    report(run, folder, &summary, held_out)?;
    Ok(true)
}

/// Says how it ended, on stdout. A closed stdout takes nothing away from the run, which is done.
fn report(run: &Run, folder: &Folder, summary: &Summary, held_out: Option<(f64, u64)>) -> Result<()> {
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
        print(held_out_line(bits, bytes, run.data.held_out_zstd, run.recipe.train.seq_len));
    }
    if run.recipe.export.at_end {
        let dir = folder.file("export");
        print(format!("exported to {}; try: tributary generate {0} --prompt \"fn main\"", dir.display()));
    }
    if let Some(prompt) = &run.recipe.export.prompt {
        print(format!("a sample, after {prompt:?}:\n---"));
        let model = plain_model(&run.config, &run.device, &run.state.weights);
        let sampling =
            Sampling { temperature: run.recipe.export.temperature, top_p: 0.95, seed: run.recipe.train.seed };
        let mut sample = prompt.clone();
        generate(&model, &run.data.tokenizer, prompt, run.recipe.export.sample_tokens, sampling, |text| {
            sample += text;
            Ok(())
        })?;
        print(format!("{sample}\n---"));
    }
    Ok(())
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
