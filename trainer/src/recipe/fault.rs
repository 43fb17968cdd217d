//! What is wrong with a recipe.

use std::fmt;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of the file, counted from 1.
    Line(usize),
    /// A `--set` on the command line.
    Set,
    /// Nowhere: the key is missing, or has its default.
    Absent,
}

/// One fault: where, what was expected, what came, how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it was written.
    pub origin: Origin,
    /// `section.key`, or as much of it as there is.
    pub key: String,
    /// One sentence: expected this, found that.
    pub what: String,
    /// How to mend it, where there is more to say.
    pub help: Option<String>,
}

impl Fault {
    /// A fault without further help.
    pub fn new(origin: Origin, key: impl Into<String>, what: impl Into<String>) -> Self {
        Self { origin, key: key.into(), what: what.into(), help: None }
    }

    /// The same fault with a way to mend it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Every fault of one recipe, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Faults {
    path: String,
    faults: Vec<Fault>,
}

impl Faults {
    /// Sorts the faults by their place: the file first, then `--set`, then what is missing.
    #[must_use]
    pub fn new(path: &str, mut faults: Vec<Fault>) -> Self {
        faults.sort_by_key(|fault| match fault.origin {
            Origin::Line(line) => (0, line),
            Origin::Set => (1, 0),
            Origin::Absent => (2, 0),
        });
        Self { path: path.to_owned(), faults }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.faults.len();
        write!(f, "{}: {count} fault{} in the recipe", self.path, if count == 1 { "" } else { "s" })?;
        for fault in &self.faults {
            match fault.origin {
                Origin::Line(line) => write!(f, "\n  {}:{line}: ", self.path)?,
                Origin::Set => write!(f, "\n  --set: ")?,
                Origin::Absent => write!(f, "\n  {}: ", self.path)?,
            }
            if !fault.key.is_empty() {
                write!(f, "{}: ", fault.key)?;
            }
            f.write_str(&fault.what)?;
            if let Some(help) = &fault.help {
                write!(f, "\n      {help}")?;
            }
        }
        Ok(())
    }
}
