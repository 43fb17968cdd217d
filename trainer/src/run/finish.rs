//! After the last step: the evaluation on all held-out text, the export, the sample, and the summary for people.

use std::io::Write as _;

use parallel::progress::Stage;

use super::Run;
use super::folder::{Folder, Status, Summary};
use super::progress::duration;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::generate::{Sampling, Source, generate, prompt_tokens};
use crate::replica::Replica;
use crate::step::{plain_model, plain_pieces};

/// Finishes the run; false when somebody asked to stop before it was done, so that `--resume` finishes it.
pub(super) fn finish(run: &mut Run, folder: Option<&Folder>) -> Result<bool> {
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
    let folder = folder.filter(|_| run.metrics.is_some());
    let together = run.exports_together();
    if !together {
        run.say_goodbye();
    }
    match run.recipe.export.at_end {
        true => export(run, folder)?,
        false => run.merge()?,
    }
    let sample = sample(run, folder.is_some())?;
    if together {
        // Whoever has nothing to do any more stays until all have what they need of it.
        run.wait_for_all()?;
        run.say_goodbye();
    }
    let Some(folder) = folder else { return Ok(true) };
    let mut summary = run.summary(Status::Done);
    summary.held_out_bits_per_byte = held_out.map(|(bits, _)| bits);
    folder.write_summary(&summary)?;

    report(run, folder, &summary, (held_out, sample));
    Ok(true)
}

/// Exports beside an export that is there already, and changes places with it only when the new one is whole. Ranks without a
/// folder give what they have of it.
fn export(run: &mut Run, folder: Option<&Folder>) -> Result<()> {
    let Some(folder) = folder else { return run.merge_into(None) };
    let [place, next, old] = ["export", "export.next", "export.old"].map(|name| folder.file(name));
    for left_over in [&next, &old] {
        if left_over.exists() {
            std::fs::remove_dir_all(left_over).map_err(Error::io("remove", left_over))?;
        }
    }
    let (config, tokenizer) = (run.config.clone(), run.data.tokenizer.json());
    let end_of_text = run.data.tokenizer.end_of_text_name().to_owned();
    let export = Export {
        config: &config,
        tokenizer: &tokenizer,
        end_of_text: &end_of_text,
        end_of_text_id: run.data.tokenizer.end_of_text(),
        dtype: run.recipe.export.dtype,
    };
    run.merge_into(Some((&export, &next)))?;
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
fn report(
    run: &Run,
    folder: &Folder,
    summary: &Summary,
    (held_out, sample): (Option<(f64, u64)>, Option<Result<String>>),
) {
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
    if let (Some(prompt), Some(sample)) = (&run.recipe.export.prompt, sample) {
        print(format!("a sample, after {prompt:?}:\n---"));
        match sample {
            Ok(sample) => print(format!("{prompt}{sample}\n---")),
            Err(error) => run.say(&format!("there is no sample: {error}")),
        }
    }
}

/// A sample, where the recipe wants one and this rank has something to do for it: it `tells` it, or holds a part of the model that
/// does. The run goes on without one, if this rank made it alone.
fn sample(run: &Run, tells: bool) -> Result<Option<Result<String>>> {
    let Some(prompt) = &run.recipe.export.prompt else { return Ok(None) };
    match run.stepper.replica() {
        // The first replica's.
        Some(replica) => match run.place().0 < replica.ranks() {
            true => Ok(Some(Ok(text(run, Some(&replica.with_all_tokens()), prompt)?))),
            false => Ok(None),
        },
        None => Ok(tells.then(|| text(run, None, prompt))),
    }
}

fn text(run: &Run, replica: Option<&Replica>, prompt: &str) -> Result<String> {
    let (keys, weights) = (&run.recipe.export, &run.state.weights);
    let pieces = match replica {
        Some(replica) => plain_pieces(replica, &run.config, &run.device, weights),
        None => vec![plain_model(&run.config, &run.device, weights)],
    };
    let source = replica.map_or(Source::Model(&pieces[0]), |replica| Source::Replica(replica, &pieces));
    let sampling = Sampling { temperature: keys.temperature, top_p: 0.95, seed: run.recipe.train.seed };
    let longest = run.config.max_position_embeddings;
    let ids = prompt_tokens(&run.data.tokenizer, "export.prompt", prompt, longest)?;
    let mut sample = String::new();
    generate(source, &run.data.tokenizer, ids, keys.sample_tokens, sampling, |text| {
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
