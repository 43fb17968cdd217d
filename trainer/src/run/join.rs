//! A rank's way into a run over several processes: from an address to connections with all other ranks.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parallel::control::{Control, ControlError, Join, local_address};
use parallel::coordinator::FromCoordinator as To;
use parallel::progress::Progress;
use parallel::transport::congestion::Congestion;
use parallel::transport::grpc::Listener;
use parallel::transport::tls::Security;
use parallel::wire::control::from_worker::What as From;
use parallel::wire::control::{Held, Hello, Holds, Leaving, Prepared, Property, Seen, Start};

use super::ender::Ender;
use super::folder::check_name;
use super::signals::Stop;
use crate::error::{Error, Result};
use crate::recipe::fault::{Fault, Origin};
use crate::recipe::{self, Faults, Raw, Recipe, Tag, keys};

/// How a worker finds its run.
#[derive(Debug)]
pub struct Ticket {
    /// Where the coordinator may be, `HOST:PORT` each; they are tried in turn.
    pub addresses: Vec<String>,
    /// The rank that it wants.
    pub rank: Option<usize>,
    /// Seconds in which the coordinator must answer.
    pub within: Duration,
    /// Its own recipe, if it has one: everything but the local keys must be the coordinator's.
    pub recipe: Option<Raw>,
    /// `--set` of local keys.
    pub sets: Vec<String>,
    /// Where the other ranks reach it, if that is not the local address of the way to the coordinator.
    pub host_address: Option<IpAddr>,
    /// What keeps strangers out.
    pub security: Security,
    /// What happens when the run ends for everybody.
    pub ender: Ender,
}

/// A worker with a rank.
#[derive(Debug)]
pub struct Joined {
    /// What keeps strangers out.
    pub security: Security,
    /// The line to the coordinator.
    pub control: Control,
    /// The recipe as written, with this machine's local keys.
    pub raw: Raw,
    /// The recipe as validated.
    pub recipe: Recipe,
    /// Where the other ranks will connect.
    pub listener: Option<Listener>,
    /// What paces what this rank sends them.
    pub congestion: Congestion,
    /// What happens when the run ends for everybody.
    pub ender: Ender,
    /// Whether the coordinator or a signal asked to stop.
    pub stop: Stop,
    /// Read by the heartbeat.
    pub progress: Arc<Progress>,
}

/// Joins a run.
///
/// # Errors
/// Nobody is there, the coordinator refuses, or the addresses are beyond loopback and nothing keeps strangers out.
pub fn join(ticket: &Ticket, stop: &Stop) -> Result<Joined> {
    for set in &ticket.sets {
        let name = set.split('=').next().unwrap_or_default().trim();
        if keys::find(name).is_some_and(|key| key.tag != Tag::Local) {
            return Err(Error::Usage(format!(
                "--set {name}: a worker takes the coordinator's recipe and may change only keys tagged local, which this \
                 is not; change it where the coordinator runs"
            )));
        }
    }
    // What is wrong with them would otherwise end the run that this worker is about to join.
    let (_, faults) = recipe::raw::read("", &ticket.sets);
    let faults: Vec<_> = faults.into_iter().filter(|fault| fault.origin != Origin::Absent).collect();
    if !faults.is_empty() {
        return Err(Faults::new("--set", faults).into());
    }
    let (ender, progress) = (ticket.ender.clone(), Arc::<Progress>::default());
    let until = Instant::now() + ticket.within;
    let mut turn = ticket.addresses.iter().cycle();
    let (control, listener) = loop {
        let address = turn.next().ok_or_else(|| Error::Usage("--join: expected HOST:PORT".into()))?;
        let left = until.saturating_duration_since(Instant::now());
        let several = ticket.addresses.len() > 1;
        let within = if several { left.min(TURN) } else { left };
        match greet(ticket, address, within, &ender, stop, &progress) {
            Err(Error::Control(ControlError::NotThere { why, .. })) => {
                if Instant::now() + Duration::from_millis(50) > until {
                    let (address, within_s) = (ticket.addresses.join(" and "), ticket.within.as_secs_f64());
                    return Err(ControlError::NotThere { address, within_s, why }.into());
                }
            }
            other => break other?,
        }
    };
    ender.joined(control.welcome().peer_timeout_s);
    let read = check_name(&control.welcome().name).and_then(|()| local_recipe(&control.welcome().recipe, ticket));
    let (raw, recipe, congestion) = match read {
        Ok(read) => read,
        Err(error) => {
            leave_with(control, &error);
            return Err(error);
        }
    };
    ender.tidy_nonces(recipe.metrics.runs_dir.clone());
    let (listener, security) = (Some(listener), ticket.security.clone());
    Ok(Joined { security, control, raw, recipe, listener, congestion, ender, stop: stop.clone(), progress })
}

/// How long one of several addresses is tried: who listens there may be somebody else, who never answers.
const TURN: Duration = Duration::from_secs(5);

fn greet(
    ticket: &Ticket,
    address: &str,
    within: Duration,
    ender: &Ender,
    stop: &Stop,
    progress: &Arc<Progress>,
) -> Result<(Control, Listener)> {
    let not_there = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::InvalidInput {
            return Error::Usage(format!("--join {address}: expected HOST:PORT of a coordinator: {error}"));
        }
        // A name may be known, and a way be there, a little later.
        let why = error.to_string();
        std::thread::sleep(Duration::from_millis(100).min(within));
        ControlError::NotThere { address: address.to_owned(), within_s: within.as_secs_f64(), why }.into()
    };
    let here = local_address(address).map_err(not_there)?;
    // On one machine the world's addresses do not matter.
    let ip = ticket.host_address.filter(|_| !here.is_loopback()).unwrap_or(here);
    permit(ip, &ticket.security)?;
    let listener = Listener::bind(ip, 0)?;
    let hello = Hello {
        version: crate::VERSION.into(),
        rank: ticket.rank.and_then(|rank| u32::try_from(rank).ok()),
        host: host(),
        pid: std::process::id(),
        recipe: ticket.recipe.as_ref().map(Raw::to_toml),
    };
    let (on_end, on_stop) = (ender.clone(), stop.clone());
    let control = Control::join(Join {
        address: address.to_owned(),
        within,
        security: ticket.security.clone(),
        hello,
        progress: progress.clone(),
        on_end: Box::new(move |ending, by| on_end.end(ending, by)),
        on_stop: Box::new(move || on_stop.ask()),
    })?;
    Ok((control, listener))
}

/// Refuses an address beyond loopback if nothing keeps strangers out there.
///
/// # Errors
/// That is so.
pub fn permit(ip: IpAddr, security: &Security) -> Result<()> {
    if security.permits(ip) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "{ip} is beyond loopback: set TRIBUTARY_JOIN_SECRET (or TRIBUTARY_JOIN_SECRET_FILE) to the same secret everywhere, \
         `openssl rand -hex 32` prints one; or give --trusted-network if nobody else is on this network"
    )))
}

/// The coordinator's recipe with the local keys of this worker, and what these ask of its system.
fn local_recipe(text: &str, ticket: &Ticket) -> Result<(Raw, Recipe, Congestion)> {
    const PATH: &str = "the coordinator's recipe";
    let mut sets = Vec::new();
    if let Some(own) = &ticket.recipe {
        let local = keys::KEYS.iter().filter(|key| key.tag == Tag::Local);
        sets.extend(local.filter_map(|key| Some(format!("{}={}", key.name, own.get(key.name)?.to_toml()))));
    }
    sets.extend(ticket.sets.iter().cloned());
    let (raw, recipe) = recipe::read(PATH, text, &sets)?;
    let congestion = Congestion::chosen(recipe.parallel.congestion_control.as_deref()).map_err(|error| {
        let key = "parallel.congestion_control";
        Faults::new(PATH, vec![Fault::new(raw.origin(key), key, error.to_string())])
    })?;
    tracing::info!("what this rank sends the others is paced by TCP's congestion control: {}", congestion.name());
    Ok((raw, recipe, congestion))
}

/// Where this rank stands, and with whom.
#[derive(Debug)]
pub struct Met {
    /// Epoch, token, peers and checkpoint.
    pub start: Start,
    /// For each rank the lead of its folder.
    pub lead_of: Vec<usize>,
}

impl Joined {
    /// This rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.control.welcome().rank as usize
    }

    /// Tells the coordinator that this rank is ready, and meets the others. `hold` is called on the lead of a run folder;
    /// it opens the folder and returns its checkpoints, and is told for each rank the lead of its folder.
    ///
    /// # Errors
    /// Somebody failed, or differs; the folder cannot be used.
    pub fn meet(&self, properties: Vec<Property>, hold: impl FnOnce(&[usize]) -> Result<Vec<Held>>) -> Result<Met> {
        let nonce = Nonce::create(&self.recipe.metrics.runs_dir)?;
        let data_address = self.listener.as_ref().map_or_else(String::new, |at| at.local_address().to_string());
        self.control.say(From::Prepared(Prepared { data_address, properties, nonce: nonce.name.clone() }));
        let look = match self.control.next()? {
            To::Look(look) => look,
            other => return Err(self.control.out_of_turn(&other).into()),
        };
        let runs = &self.recipe.metrics.runs_dir;
        let seen = |name: &String| Nonce::is_name(name) && std::fs::File::open(runs.join(name)).is_ok();
        let nonces = look.nonces.into_iter().filter(seen).collect();
        self.control.say(From::Seen(Seen { nonces }));
        let places = match self.control.next()? {
            To::Places(places) => places,
            other => return Err(self.control.out_of_turn(&other).into()),
        };
        drop(nonce);
        let lead_of: Vec<usize> = places.lead_of.into_iter().map(|rank| rank as usize).collect();
        let checkpoints = if lead_of.get(self.rank()) == Some(&self.rank()) { hold(&lead_of)? } else { Vec::new() };
        self.control.say(From::Holds(Holds { checkpoints }));
        match self.control.next()? {
            To::Start(start) => Ok(Met { start, lead_of }),
            other => Err(self.control.out_of_turn(&other).into()),
        }
    }
}

/// Where all ranks listen.
///
/// # Errors
/// What is no address, which a coordinator of this version does not send.
pub fn addresses(start: &Start) -> Result<Vec<SocketAddr>> {
    let parse = |text: &String| text.parse().map_err(|_| Error::Usage(format!("a rank's address is {text:?}")));
    start.peers.iter().map(|peer| parse(&peer.data_address)).collect()
}

/// What a worker says that cannot go on.
#[must_use]
pub fn failed(step: u64, error: &Error) -> Leaving {
    let (code, between_ranks) = (error.exit_code().into(), error.is_between_ranks());
    Leaving { step, error: Some(error.to_string()), code, between_ranks, ..Leaving::default() }
}

/// Tells the coordinator that this worker cannot go on.
pub fn leave_with(control: Control, error: &Error) {
    control.leave(failed(0, error));
}

/// A small file by which machines find out whether they share a folder.
struct Nonce {
    path: PathBuf,
    name: String,
}

const NONCE: &str = ".nonce-";

impl Nonce {
    fn create(runs: &Path) -> Result<Self> {
        let name = format!("{}{}", nonces_of(std::process::id()), random());
        let path = runs.join(&name);
        std::fs::write(&path, &name).map_err(Error::io("write", &path))?;
        Ok(Self { path, name })
    }

    fn is_name(name: &str) -> bool {
        name.starts_with(NONCE) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
    }
}

impl Drop for Nonce {
    fn drop(&mut self) {
        // The folder may have gone with the machine's network; then there is nothing to remove.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// How the nonces of one process begin: on folders that many machines share, process ids are not enough.
fn nonces_of(pid: u32) -> String {
    let host = blake3::hash(host().as_bytes()).to_hex();
    format!("{NONCE}{}-{pid}-", &host[..8])
}

/// Removes what a killed process of this id left in the folder of runs.
pub fn remove_nonces(runs: &Path, pid: u32) {
    let mine = nonces_of(pid);
    for entry in std::fs::read_dir(runs).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&mine) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The name of this machine.
#[must_use]
pub fn host() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

/// Thirty-two hexadecimal digits that nobody had before. Not for secrets.
#[must_use]
pub fn random() -> String {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    // Each state has a key of its own from the system's random numbers.
    let half = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", half(), half())
}
