//! The recipe as written: TOML, then `--set`, each value checked on its own against the table of keys.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::{Fault, Origin};
use super::keys::{self, KEYS, Kind, Tag};

/// A value of one of the types that the table knows.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Integer(i64),
    /// A number.
    Real(f64),
    /// A truth value.
    Flag(bool),
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of whole numbers.
    Integers(Vec<i64>),
}

/// Everything that was written, and the defaults of the rest. Values that are at fault are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Raw {
    values: BTreeMap<&'static str, (Value, Origin)>,
}

/// Reads the text of a recipe and applies `section.key=value` overrides in order.
#[must_use]
pub fn read(text: &str, sets: &[String]) -> (Raw, Vec<Fault>) {
    let mut faults = Vec::new();
    let mut raw = Raw { values: BTreeMap::new() };
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let line = error.span().map_or(Origin::Absent, |span| Origin::Line(line_of(text, span.start)));
        faults.push(Fault::new(line, "", format!("not valid TOML: {}", error.message())));
    }
    for (section, body) in document.get_ref() {
        let line = Origin::Line(line_of(text, section.span().start));
        let section = section.get_ref().as_ref();
        match body.get_ref() {
            DeValue::Table(table) if keys::sections().contains(&section) => {
                for (key, value) in table {
                    let line = Origin::Line(line_of(text, key.span().start));
                    raw.put(&format!("{section}.{}", key.get_ref()), convert(value), line, &mut faults);
                }
            }
            DeValue::Table(_) => {
                let help = did_you_mean(section, keys::sections().into_iter());
                faults.push(Fault { help, ..Fault::new(line, format!("[{section}]"), "no such section") });
            }
            DeValue::Array(_) if keys::sections().contains(&section) => faults.push(
                Fault::new(line, section, "expected one section, found a list").help(format!("write [{section}]")),
            ),
            _ => faults.push(
                Fault::new(line, section, "a key outside every section").help("write it under a [section] header"),
            ),
        }
    }
    for set in sets {
        raw.set(set, &mut faults);
    }
    for key in KEYS {
        match key.default.value() {
            _ if raw.values.contains_key(key.name) => {}
            Some(value) => _ = raw.values.insert(key.name, (value, Origin::Absent)),
            None if key.default == keys::Fallback::Required && !faults.iter().any(|fault| fault.key == key.name) => {
                faults.push(Fault::new(
                    Origin::Absent,
                    key.name,
                    format!("missing: expected {} ({})", key.kind.expectation(), key.about),
                ));
            }
            None => {}
        }
    }
    (raw, faults)
}

impl Raw {
    /// The value of a key of the table, if it has one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name).map(|(value, _)| value)
    }

    /// Where the value was written.
    #[must_use]
    pub fn origin(&self, name: &str) -> Origin {
        self.values.get(name).map_or(Origin::Absent, |(_, origin)| origin.clone())
    }

    /// Keys with one of these tags whose values differ between the two recipes.
    #[must_use]
    pub fn differences(&self, other: &Self, tag: Tag) -> Vec<String> {
        KEYS.iter()
            .filter(|key| key.tag == tag && self.get(key.name) != other.get(key.name))
            .map(|key| {
                let show = |raw: &Self| raw.get(key.name).map_or_else(|| "nothing".to_owned(), Value::to_toml);
                format!("{}: the run has {}, the recipe says {}", key.name, show(other), show(self))
            })
            .collect()
    }

    /// The whole recipe, defaults written out, as TOML that [`read`] reads back to the same values.
    #[must_use]
    pub fn to_toml(&self) -> String {
        self.print(|_| true)
    }

    /// BLAKE3 of everything that decides what is computed: the keys tagged fixed and resumable.
    #[must_use]
    pub fn hash(&self) -> String {
        let text = self.print(|tag| matches!(tag, Tag::Fixed | Tag::Resumable));
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    fn print(&self, wanted: impl Fn(Tag) -> bool) -> String {
        let mut out = String::new();
        let mut section = "";
        for key in KEYS.iter().filter(|key| wanted(key.tag)) {
            let Some(value) = self.get(key.name) else { continue };
            if section != keys::section(key.name) {
                section = keys::section(key.name);
                let _ = writeln!(out, "{}[{section}]", if out.is_empty() { "" } else { "\n" });
            }
            let _ = writeln!(out, "{} = {}", &key.name[section.len() + 1..], value.to_toml());
        }
        out
    }

    fn put(&mut self, name: &str, value: Result<Value, String>, origin: Origin, faults: &mut Vec<Fault>) {
        let Some(key) = keys::find(name) else {
            // Within a section that exists, a slip is in the key alone.
            let section = keys::section(name);
            let known = |key: &&keys::Key| keys::section(key.name) == section;
            let siblings = KEYS.iter().filter(known).map(|key| &key.name[section.len() + 1..]);
            let help = match name.split_once('.') {
                Some((_, key)) if keys::sections().contains(&section) => {
                    nearest(key, siblings).map(|key| format!("did you mean {section}.{key}?"))
                }
                _ => did_you_mean(name, KEYS.iter().map(|key| key.name)),
            };
            return faults.push(Fault { help, ..Fault::new(origin, name, "no such key") });
        };
        // A whole number is welcome where a number is expected.
        let value = match (value, key.kind) {
            (Ok(Value::Integer(x)), Kind::Real(..)) => Ok(Value::Real(x as f64)),
            (other, _) => other,
        };
        match value.and_then(|value| value.check(key.kind).map(|()| value)) {
            Ok(value) => _ = self.values.insert(key.name, (value, origin)),
            Err(found) => {
                let help = match key.kind {
                    Kind::Choice(words) => did_you_mean(found.trim_matches('"'), words.iter().copied()),
                    _ => None,
                };
                let what = format!("expected {}, found {found}", key.kind.expectation());
                faults.push(Fault { help, ..Fault::new(origin, name, what) });
            }
        }
    }

    fn set(&mut self, set: &str, faults: &mut Vec<Fault>) {
        let Some((name, text)) = set.split_once('=') else {
            return faults.push(Fault::new(Origin::Set, set, "expected section.key=value"));
        };
        let (name, text) = (name.trim(), text.trim());
        let bare = keys::find(name).is_some_and(|key| matches!(key.kind, Kind::Text | Kind::Choice(_)));
        let value = match DeValue::parse(text) {
            Ok(value) if !bare || value.get_ref().is_str() => convert(&value),
            // On a command line a text needs no quotes.
            _ if bare => Ok(Value::Text(text.to_owned())),
            Ok(value) => convert(&value),
            Err(_) => Err(text.to_owned()),
        };
        self.put(name, value, Origin::Set, faults);
    }
}

impl Value {
    /// Whether the value is of this kind; if not, the value as it should be shown after "found".
    ///
    /// # Errors
    /// The value in TOML's notation.
    pub fn check(&self, kind: Kind) -> Result<(), String> {
        let fits = match (self, kind) {
            (Self::Integer(x), Kind::Integer(min, max)) => (min..=max).contains(x),
            (Self::Real(x), Kind::Real(min, max)) => (min..=max).contains(x),
            (Self::Text(x), Kind::Choice(words)) => words.contains(&x.as_str()),
            (Self::Integers(list), Kind::Integers(min, max)) => list.iter().all(|x| (min..=max).contains(x)),
            (Self::Flag(_), Kind::Flag) | (Self::Text(_), Kind::Text) | (Self::Texts(_), Kind::Texts) => true,
            _ => false,
        };
        if fits { Ok(()) } else { Err(self.to_toml()) }
    }

    /// The value in TOML's notation.
    #[must_use]
    pub fn to_toml(&self) -> String {
        match self {
            Self::Integer(x) => x.to_string(),
            Self::Real(x) => format!("{x:?}"),
            Self::Flag(x) => x.to_string(),
            Self::Text(x) => toml::Value::String(x.clone()).to_string(),
            Self::Texts(x) => toml::Value::from(x.clone()).to_string(),
            Self::Integers(x) => toml::Value::from(x.clone()).to_string(),
        }
    }
}

/// Reads values whose types the table has already checked.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a Raw);

impl Reader<'_> {
    /// A whole number that is not negative.
    #[must_use]
    pub fn count(&self, name: &str) -> Option<usize> {
        match self.0.get(name)? {
            Value::Integer(x) => usize::try_from(*x).ok(),
            _ => None,
        }
    }

    /// A number.
    #[must_use]
    pub fn real(&self, name: &str) -> Option<f64> {
        match self.0.get(name)? {
            Value::Real(x) => Some(*x),
            _ => None,
        }
    }

    /// A truth value.
    #[must_use]
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name)? {
            Value::Flag(x) => Some(*x),
            _ => None,
        }
    }

    /// A text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        match self.0.get(name)? {
            Value::Text(x) => Some(x.clone()),
            _ => None,
        }
    }

    /// A list of texts; empty when there is none.
    #[must_use]
    pub fn texts(&self, name: &str) -> Vec<String> {
        match self.0.get(name) {
            Some(Value::Texts(x)) => x.clone(),
            _ => Vec::new(),
        }
    }

    /// A list of counts.
    #[must_use]
    pub fn counts(&self, name: &str) -> Option<Vec<usize>> {
        match self.0.get(name)? {
            Value::Integers(x) => x.iter().map(|&x| usize::try_from(x).ok()).collect(),
            _ => None,
        }
    }
}

/// A TOML value as one of ours, or how it should be shown after "found".
fn convert(value: &Spanned<DeValue<'_>>) -> Result<Value, String> {
    let show = |value: &DeValue<'_>| format!("a {}", value.type_str());
    match value.get_ref() {
        DeValue::String(x) => Ok(Value::Text(x.to_string())),
        DeValue::Boolean(x) => Ok(Value::Flag(*x)),
        DeValue::Integer(x) => {
            i64::from_str_radix(x.as_str(), x.radix()).map(Value::Integer).map_err(|_| x.as_str().to_owned())
        }
        DeValue::Float(x) => x.as_str().parse().map(Value::Real).map_err(|_| x.as_str().to_owned()),
        DeValue::Array(items) => {
            // A list is of what its first item is; an empty one is of texts.
            let wrong = |other: &Spanned<DeValue<'_>>| format!("a list with {} in it", show(other.get_ref()));
            if let Some(DeValue::Integer(_)) = items.iter().next().map(Spanned::get_ref) {
                let whole = |item| match convert(item) {
                    Ok(Value::Integer(x)) => Ok(x),
                    _ => Err(wrong(item)),
                };
                return items.iter().map(whole).collect::<Result<_, _>>().map(Value::Integers);
            }
            let text = |item: &Spanned<DeValue<'_>>| match item.get_ref() {
                DeValue::String(x) => Ok(x.to_string()),
                _ => Err(wrong(item)),
            };
            items.iter().map(text).collect::<Result<_, _>>().map(Value::Texts)
        }
        other => Err(show(other)),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count() + 1
}

/// The nearest of the known names, if it is near enough to be a slip of the fingers.
fn did_you_mean<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    nearest(found, known).map(|name| format!("did you mean {name}?"))
}

fn nearest<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.map(|name| (strsim::jaro_winkler(found, name), name)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (near.0 > 0.8).then_some(near.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_written_out_and_read_back_to_the_same_values() {
        let text = "[train]\nsteps = 3\nseq_len = 8\nmicro_batch_size = 2\n[schedule]\nlearning_rate = 1\n[data]\nsource = 'text'\ntrain = ['a\"b', 'c']\n";
        let (raw, faults) = read(text, &["train.seed=7".into(), "model.from=some run".into()]);
        assert_eq!(faults, []);
        assert_eq!(raw.get("schedule.learning_rate"), Some(&Value::Real(1.0)));
        assert_eq!(raw.get("model.from"), Some(&Value::Text("some run".into())));
        let (again, faults) = read(&raw.to_toml(), &[]);
        assert_eq!(faults, []);
        assert!(KEYS.iter().all(|key| raw.get(key.name) == again.get(key.name)));
        assert_eq!(raw.hash(), again.hash());
    }

    #[test]
    fn the_hash_follows_what_is_computed_and_nothing_else() {
        let text = "[train]\nsteps = 3\n";
        let hash = |set: &str| read(text, &[set.to_owned()]).0.hash();
        assert_eq!(hash("metrics.runs_dir=elsewhere"), hash("device.threads=2"));
        assert_ne!(hash("train.seed=2"), hash("train.seed=3"));
    }

    #[test]
    fn a_set_that_is_no_assignment_or_no_key_is_named() {
        let faults = |set: &str| {
            let mut faults = read("", &[set.to_owned()]).1;
            faults.retain(|fault| fault.origin == Origin::Set);
            faults
        };
        assert_eq!(faults("steps")[0].what, "expected section.key=value");
        assert_eq!(faults("train.stepz=3")[0].help.as_deref(), Some("did you mean train.steps?"));
        assert_eq!(faults("train.steps=many")[0].what, "expected an integer from 1 to 2147483648, found many");
        assert_eq!(faults("device.backend=fleks")[0].help.as_deref(), Some("did you mean flex?"));
    }
}
