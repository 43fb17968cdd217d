//! `inspect` and `verify` of copies in a store. Nothing of them comes onto this disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use checkpoint::reader::Checkpoint;
use checkpoint::store::place::SCHEMES;
use checkpoint::store::{At, Place, Remote, Settings};

use super::super::print;
use super::{Inspect, contents, say_audited, text};
use crate::error::{Error, Result};

/// What was given, if it is a URL.
pub fn url(what: &Path) -> Option<&str> {
    what.to_str().filter(|what| SCHEMES.iter().any(|scheme| what.starts_with(scheme)))
}

/// The place of a run, and the copies that are meant: the one that the URL names, or all of the run's.
fn find(url: &str, settings: &Settings) -> Result<(Remote, Vec<At>)> {
    let usage = |why: String| Error::Usage(format!("{url}: {why}"));
    let place = Place::parse(url).map_err(usage)?;
    if let Some((run, at)) = At::of(&place) {
        let remote = Remote::open(&run, settings)?;
        return match remote.list()?.contains(&at) {
            true => Ok((remote, vec![at])),
            false => Err(usage("there is no such checkpoint: it would have a manifest.json".into())),
        };
    }
    let remote = Remote::open(&place, settings)?;
    let all = remote.list()?;
    if all.is_empty() {
        let why = "expected the URL of a run or of a checkpoint; there is no checkpoint below it";
        return Err(usage(why.into()));
    }
    Ok((remote, all))
}

pub fn inspect(url: &str, args: &Inspect, settings: &Settings) -> Result<ExitCode> {
    if args.checksums {
        let why = "--checksums reads tensors, which it does in folders alone: copy the checkpoint to one";
        return Err(Error::Usage(format!("{url}: {why}")));
    }
    let (remote, mut all) = find(url, settings)?;
    let newest = all.pop().expect("there is one");
    let checkpoint = Checkpoint::described(remote.url_of(newest).into(), remote.manifest(newest)?);
    let others: Vec<PathBuf> = all.into_iter().map(|at| remote.url_of(at).into()).collect();
    print(&match args.place.json {
        true => format!("{}\n", contents(&checkpoint, &others, None)),
        false => text::contents(&checkpoint, &others, args.all, None),
    })
}

pub fn verify(url: &str, json: bool, settings: &Settings) -> Result<ExitCode> {
    let (remote, all) = find(url, settings)?;
    let mut whole = true;
    for at in all {
        let audit = remote.audit(at)?;
        whole &= audit.damage.is_empty();
        say_audited(Path::new(&remote.url_of(at)), &audit, json)?;
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
