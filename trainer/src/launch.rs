//! The process that starts the ranks of this machine, hosts the coordinator where that is its task, and watches over
//! both. It never trains.
//!
//! - [`children`]: worker processes: how they start, how they end, and that none is left.

pub mod children;

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::disk::RealDisk;
use checkpoint::writer::give_up_all;
use parallel::coordinator::state::{Ending, Input, Options, RankNumbers, silence};
use parallel::coordinator::{Compare, Coordinator};
use parallel::transport::tls::Security;
use serde_json::json;

use crate::data::cache::replace;
use crate::error::{Error, Result};
use crate::log::say;
use crate::prometheus::{Endpoint, Port};
use crate::recipe::resolved::Parallel;
use crate::recipe::{Raw, Tag, raw};
use crate::run::folder::{check_name, in_use};
use crate::run::join::{host, permit, random, remove_nonces};
use crate::run::signals::{Manner, Stop, TRY_AGAIN};
use crate::run::{Request, start};

use children::{Children, End, Hears, Worker};

/// Where the ranks of a run are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum World {
    /// All on this machine.
    Local,
    /// One a process like this one, as torchrun, Slurm or `hosts.sh` start them.
    Ranks(Ranks),
    /// Elsewhere: this process only hosts the coordinator, here.
    Elsewhere {
        /// Where it listens.
        listen: SocketAddr,
    },
}

/// What the environment says of the ranks: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TRIBUTARY_PORT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// This process's rank.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// The machine of rank 0.
    pub master: String,
    /// Ports for the coordinator; where the first is taken, the next is used.
    pub ports: Vec<u16>,
}

/// What a launcher was asked for.
#[derive(Debug)]
pub struct Orders {
    /// The run.
    pub request: Request,
    /// How often it is started again after it lost a peer.
    pub restarts: u32,
    /// Where its ranks are.
    pub world: World,
    /// What keeps strangers out.
    pub security: Security,
}

/// The exit code of a Rust process that panicked.
const PANICKED: i32 = 101;
/// How long children have to end by themselves when nobody was lost.
const END_WITHIN: Duration = Duration::from_secs(10);
/// How often the launcher looks after its children. It shares a core with one of them, and a coordinator hears of their ends at
/// once.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks at what others are taking away.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Runs the ranks to their end, again after a lost peer if that is wanted, and returns the exit code.
///
/// # Errors
/// What can be refused before there is a rank.
pub fn launch(mut orders: Orders) -> Result<u8> {
    let recipe = &orders.request.recipe;
    let ranks_in_all = recipe.parallel.mesh().ranks();
    if let World::Ranks(ranks) = &orders.world
        && ranks.ranks != ranks_in_all
    {
        let (world, Parallel { data, pipeline, tensor, .. }) = (ranks.ranks, &recipe.parallel);
        return Err(Error::Usage(match (pipeline, tensor) {
            (1, 1) => format!(
                "WORLD_SIZE is {world}, the recipe's parallel.data is {data}: make them equal, for example by --set \
                 parallel.data={world}"
            ),
            _ => format!(
                "WORLD_SIZE is {world}, the recipe's parallel.data x parallel.pipeline x parallel.tensor is {data} x \
                 {pipeline} x {tensor}: make them equal"
            ),
        }));
    }
    check_name(&orders.request.name)?;
    let family = Children::default();
    let manner = Manner { grace_s: recipe.checkpoint.grace_s, second_ends: true };
    let (kill, runs, name) = (family.clone(), recipe.metrics.runs_dir.clone(), orders.request.name.clone());
    let at_once = move || {
        let pids = kill.pids();
        kill.kill_all();
        tidy(&runs, &name, &pids, TRY_AGAIN);
    };
    let stop = Stop::default();
    stop.listen(manner, at_once).map_err(Error::io("listen for signals in", "this process"))?;
    if orders.world == World::Local && orders.request.resume {
        // Its checkpoint has the tokenizer, and the weights that it started from.
        start::bring(&orders.request, 0, &[0])?;
    }
    if !matches!(orders.world, World::Elsewhere { .. }) {
        start::prepare_text(&orders.request)?;
    }
    for restart in 0..=orders.restarts {
        let ending = attempt(&orders, restart, &family, &stop)?;
        if !ending.verdict.is_empty() {
            say(&format!("error: {}", ending.verdict));
        }
        if ending.code != TRY_AGAIN || stop.asked() || restart == orders.restarts {
            return Ok(ending.code);
        }
        say(&format!("starting again from the newest checkpoint, restart {} of {}", restart + 1, orders.restarts));
        orders.request.resume = true;
    }
    Ok(TRY_AGAIN)
}

/// One life of the group.
fn attempt(orders: &Orders, restart: u32, family: &Children, stop: &Stop) -> Result<Ending> {
    let request = &orders.request;
    let recipe = &request.recipe;
    let mut endpoint = None;
    let (coordinator, join) = match &orders.world {
        World::Local => {
            let listener = listen(([127, 0, 0, 1], 0).into())?;
            let coordinator = coordinate(orders, restart, &mut endpoint, listener)?;
            let address = coordinator.address().to_string();
            (Some(coordinator), vec![address])
        }
        World::Ranks(ranks) => {
            let coordinator = match ranks.rank {
                0 => Some(coordinate(orders, restart, &mut endpoint, master_listener(ranks, &orders.security)?)?),
                _ => None,
            };
            let at = |port: &u16| format!("{}:{port}", ranks.master);
            let join = match &coordinator {
                Some(coordinator) => vec![at(&coordinator.address().port())],
                None => ranks.ports.iter().map(at).collect(),
            };
            (coordinator, join)
        }
        World::Elsewhere { listen: at } => {
            permit(at.ip(), &orders.security)?;
            let coordinator = coordinate(orders, restart, &mut endpoint, listen(*at)?)?;
            let address = coordinator.address();
            say(&format!(
                "coordinating {} ranks at {address}: start them with `tributary worker --join {address}`",
                recipe.parallel.mesh().ranks()
            ));
            (Some(coordinator), Vec::new())
        }
    };
    let ranks: Vec<usize> = match &orders.world {
        World::Local => (0..recipe.parallel.mesh().ranks()).collect(),
        World::Ranks(ranks) => vec![ranks.rank],
        World::Elsewhere { .. } => Vec::new(),
    };
    let worker = Worker {
        join,
        recipe: request.raw.to_toml(),
        quiet: coordinator.is_some(),
        trusted_network: matches!(orders.security, Security::TrustedNetwork),
        trace_steps: request.trace_steps,
        within_s: recipe.parallel.join_timeout_s,
    };
    let hears = coordinator.as_ref().map(|coordinator| {
        let tell = coordinator.teller();
        let hears = move |end: End| tell(Input::Exited { pid: end.pid, how: end.how, code: end.code });
        Arc::new(hears) as Hears
    });
    for (index, &rank) in ranks.iter().enumerate() {
        let cores = (recipe.parallel.pin && ranks.len() > 1).then_some((index, ranks.len()));
        if let Err(error) = family.start(&worker, rank, cores, hears.as_ref()) {
            family.kill_all();
            return Err(error);
        }
    }
    // Before anybody is seen to end.
    let pids = family.pids();
    let ending = watch(coordinator.as_ref(), family, stop, recipe.parallel.peer_timeout_s);
    family.end(if ending.code == 0 { END_WITHIN } else { quarter(recipe.parallel.peer_timeout_s) });
    if let Some(coordinator) = &coordinator {
        keep_numbers(coordinator, &recipe.metrics.runs_dir.join(&request.name));
    }
    drop((coordinator, endpoint));
    tidy(&recipe.metrics.runs_dir, &request.name, &pids, ending.code);
    Ok(ending)
}

/// Writes down what the coordinator has collected from all ranks, `ranks.jsonl`, one object a rank.
fn keep_numbers(coordinator: &Coordinator, folder: &Path) {
    let line = |rank: RankNumbers| {
        let RankNumbers { rank, host, pid, numbers, .. } = rank;
        let n = numbers.unwrap_or_default();
        let peers = n.peers.iter().map(|to| json!({ "rank": to.rank, "sent": to.sent, "received": to.received }));
        let line = json!({
            "rank": rank, "host": host, "pid": pid, "step": n.step, "step_s": n.step_s, "encode_s": n.encode_s,
            "wait_s": n.wait_s, "wire_bytes_sent": n.wire_bytes_sent, "wire_bytes_received": n.wire_bytes_received,
            "memory_bytes": n.memory_bytes, "peers": peers.collect::<Vec<_>>(),
        });
        format!("{line}\n")
    };
    let text: String = coordinator.numbers().into_iter().map(line).collect();
    tracing::info!("what the ranks said last:\n{text}");
    // A coordinator of ranks elsewhere has no run folder.
    if folder.join("run.json").exists()
        && let Err(error) = replace(&folder.join("ranks.jsonl"), text.as_bytes())
    {
        tracing::warn!("ranks.jsonl cannot be written: {error}");
    }
}

/// What is left of the peer timeout once somebody is lost.
fn quarter(peer_timeout_s: f64) -> Duration {
    let all = Duration::from_secs_f64(peer_timeout_s);
    all - silence(all)
}

/// Waits for the run's end: the coordinator's word, or without one the end of the only child.
fn watch(coordinator: Option<&Coordinator>, family: &Children, stop: &Stop, peer_timeout_s: f64) -> Ending {
    let mut told = false;
    let stopped_max = silence(Duration::from_secs_f64(peer_timeout_s));
    loop {
        let ends = family.look();
        match coordinator {
            Some(coordinator) => {
                for end in ends {
                    coordinator.tell(Input::Exited { pid: end.pid, how: end.how, code: end.code });
                }
                if stop.asked() && !told {
                    told = true;
                    coordinator.tell(Input::Stop);
                }
                if let Some(ending) = coordinator.ending(LOOK) {
                    return ending;
                }
            }
            None => {
                if let Some(end) = ends.into_iter().next() {
                    // What the worker has to say it has said itself.
                    let verdict = if end.code.is_some() {
                        String::new()
                    } else {
                        format!("the worker (process {}) {}", end.pid, end.how)
                    };
                    let code = match end.code {
                        Some(PANICKED) => 1,
                        code => code.and_then(|code| u8::try_from(code).ok()).unwrap_or(TRY_AGAIN),
                    };
                    return Ending { verdict, code };
                }
                if let Some(pid) = family.stopped_for(stopped_max) {
                    let verdict = format!(
                        "the worker (process {pid}) was stopped for {:.1} s and is killed",
                        stopped_max.as_secs_f64()
                    );
                    return Ending { verdict, code: TRY_AGAIN };
                }
                if stop.asked() && !told {
                    told = true;
                    family.terminate();
                }
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// Starts the coordinator of this life.
fn coordinate(
    orders: &Orders,
    restart: u32,
    endpoint: &mut Option<Endpoint>,
    listener: TcpListener,
) -> Result<Coordinator> {
    let port = Port::open(orders.request.recipe.metrics.prometheus_port)?;
    let (request, parallel) = (&orders.request, &orders.request.recipe.parallel);
    let options = Options {
        ranks: parallel.mesh().ranks(),
        version: crate::VERSION.into(),
        recipe: request.raw.to_toml(),
        name: request.name.clone(),
        resume: request.resume,
        resume_from_earlier: request.resume_from_earlier,
        resume_without_residuals: request.resume_without_residuals,
        restart,
        choose_codec_anew: request.choose_codec_anew,
        metrics_address: port.as_ref().map(Port::url),
        peer_timeout: Duration::from_secs_f64(parallel.peer_timeout_s),
        join_within: Duration::from_secs_f64(parallel.join_timeout_s),
        epoch: restart + 1,
        token: random(),
        host: host(),
        pid: std::process::id(),
    };
    let ours = request.raw.clone();
    let failed = Error::io("start the coordinator in", "this process");
    let coordinator = Coordinator::start(listener, options, compare(ours), orders.security.clone()).map_err(failed)?;
    if let Some(port) = port {
        tracing::info!("metrics for Prometheus: {}", port.url());
        *endpoint = Some(port.serve(Arc::new(coordinator.shown()))?);
    }
    Ok(coordinator)
}

/// Names every key but the local ones in which a worker's recipe differs.
fn compare(ours: Raw) -> Compare {
    Arc::new(move |theirs: &str| {
        let (theirs, faults) = raw::read(theirs, &[]);
        let broken = faults.iter().map(|fault| format!("{}: {}", fault.key, fault.what));
        let tags = [Tag::Fixed, Tag::Resumable, Tag::Free];
        let show = |key: &str, ours: Option<&raw::Value>, theirs: Option<&raw::Value>| {
            let text = |value: Option<&raw::Value>| value.map_or_else(|| "nothing".to_owned(), raw::Value::to_toml);
            format!("{key}: the coordinator has {}, the worker {}", text(ours), text(theirs))
        };
        let keys = crate::recipe::keys::KEYS.iter().filter(|key| tags.contains(&key.tag));
        let differ = keys.filter(|key| ours.get(key.name) != theirs.get(key.name));
        broken.chain(differ.map(|key| show(key.name, ours.get(key.name), theirs.get(key.name)))).collect()
    })
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).map_err(|error| {
        let why = match error.kind() {
            std::io::ErrorKind::AddrInUse => "the port is in use: stop who has it, or choose another".to_owned(),
            _ => error.to_string(),
        };
        Error::Usage(format!("the coordinator cannot listen at {address}: {why}"))
    })
}

/// Listens where rank 0 is to listen: at the first of the ports that is free.
fn master_listener(ranks: &Ranks, security: &Security) -> Result<TcpListener> {
    let ip = resolve(&ranks.master)?;
    let written = ranks.master == "localhost" || ranks.master.parse::<IpAddr>().is_ok();
    if ip.is_loopback() && !written {
        return Err(Error::Usage(format!(
            "MASTER_ADDR: {} is {ip} on this machine, as /etc/hosts says, where no other machine can reach it: write its \
             address on the network",
            ranks.master
        )));
    }
    permit(ip, security)?;
    let mut last = Err(Error::Usage("MASTER_PORT: expected a port".into()));
    for &port in &ranks.ports {
        last = listen((ip, port).into());
        if last.is_ok() {
            break;
        }
    }
    last
}

/// The address behind a name.
///
/// # Errors
/// There is none.
pub fn resolve(host: &str) -> Result<IpAddr> {
    let wrong = |why: String| Error::Usage(format!("MASTER_ADDR: expected a host, found {host:?}: {why}"));
    let mut addresses = (host, 0).to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    addresses.next().map(|address| address.ip()).ok_or_else(|| wrong("it has no address".into()))
}

/// Takes away what killed workers could not.
fn tidy(runs: &Path, name: &str, pids: &[u32], code: u8) {
    pids.iter().for_each(|&pid| remove_nonces(runs, pid));
    // If somebody works on the run now, what is half-written there is theirs.
    if code != 0 && !in_use(&runs.join(name)) {
        let until = Instant::now() + Duration::from_secs(1);
        let checkpoints = runs.join(name).join("checkpoints");
        give_up_all(&RealDisk, &checkpoints, std::process::id() as usize);
        // A rank of another machine that shares the folder may have been at it.
        while checkpoints.is_dir() && left_over(&checkpoints) && Instant::now() < until {
            std::thread::sleep(LOOK_AGAIN);
            give_up_all(&RealDisk, &checkpoints, std::process::id() as usize);
        }
    }
}

fn left_over(checkpoints: &Path) -> bool {
    let entries = std::fs::read_dir(checkpoints).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| checkpoint::layout::is_left_over(&entry.file_name().to_string_lossy()))
}
