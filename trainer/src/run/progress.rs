//! What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere. Both on stderr.

use std::io::IsTerminal as _;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::metrics::Line;
use crate::log::say;

/// The bar, or the lines.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u64,
    log_every: u64,
    /// Bytes sent so far, and what they would have been as f32.
    sent: [u64; 2],
}

impl Progress {
    /// Starts at step `start` of `steps`.
    #[must_use]
    pub fn new(start: u64, steps: u64, log_every: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps).with_position(start).with_elapsed(std::time::Duration::ZERO);
            let template = "{bar:24} step {pos}/{len}  {msg}  {eta} left";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.reset_eta();
            bar
        });
        Self { bar, steps, log_every, sent: [0; 2] }
    }

    /// Shows a step; `f32_bytes` are what a rank would send if everything travelled as f32, where there are several.
    pub fn step(&mut self, line: &Line, f32_bytes: Option<u64>) {
        let skipped = line.loss.is_none() || line.grad_norm.is_none();
        let loss = match line.loss {
            Some(loss) if !skipped => format!("{loss:.4}"),
            _ => "or gradient not finite, skipped".to_owned(),
        };
        let rate = line.tokens_per_s;
        let wire = f32_bytes.map_or_else(String::new, |f32_bytes| {
            // Over all steps: what a step sends may leave the socket in the next.
            self.sent = [self.sent[0] + line.wire_bytes_sent, self.sent[1] + f32_bytes];
            let ratio = self.sent[1] as f64 / self.sent[0].max(1) as f64;
            format!("  {} sent ({ratio:.2} x less than f32)", HumanBytes(line.wire_bytes_sent))
        });
        if let Some(bar) = &self.bar {
            bar.set_message(format!("loss {loss}  {rate:.0} tokens/s{wire}"));
            bar.set_position(line.step);
        } else if line.step.is_multiple_of(self.log_every) || line.step == self.steps || line.step == 1 || skipped {
            let left = (self.steps - line.step.min(self.steps)) as f64 * line.step_s;
            say(&format!(
                "step {}/{}  loss {loss}  {rate:.0} tokens/s{wire}  {} left",
                line.step,
                self.steps,
                duration(left)
            ));
        }
        if let Some(eval) = line.eval_loss {
            self.say(&format!("step {}: held-out loss {eval:.4}", line.step));
        }
    }

    /// Says something that is no step, above the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Seconds as a person says them.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}
