//! The way to the other ranks, and what goes to the coordinator as soon as it is seen there.

use std::sync::Arc;
use std::time::Duration;

use parallel::control::Reporter;
use parallel::data::StreamError;
use parallel::data::engine::EngineError;
use parallel::trace::Trace;
use parallel::transport::grpc::{self, GrpcTransport};
use parallel::transport::{Incoming, Sink};
use parallel::wire::control::Start;

use crate::error::Result;
use crate::run::join::{Joined, addresses, failed};

/// Tells the coordinator why this rank cannot complete its step, while the training thread may still compute.
pub fn at_once(reporter: Reporter) -> impl Fn(&EngineError) + Send + Sync + 'static {
    move |fault| match fault {
        EngineError::Lost(loss) => reporter.lost(loss.rank, &loss.to_string()),
        fault => reporter.failed(failed(0, &StreamError::from(fault.clone()).into())),
    }
}

/// Connects with all other ranks.
pub fn meet(joined: &mut Joined, start: &Start, inbox: Sink, trace: Option<Arc<Trace>>) -> Result<GrpcTransport> {
    let group = grpc::Group {
        rank: joined.rank(),
        addresses: addresses(start)?,
        epoch: start.epoch,
        token: start.token.clone(),
        // Whoever dies meanwhile is noticed on the control plane; a slow disk is no death.
        connect_within: Duration::from_secs_f64(joined.recipe.parallel.join_timeout_s),
        security: joined.security.clone(),
        congestion: joined.congestion.clone(),
    };
    // Every lost rank is reported at once, also before there is an engine, which adds what this rank lacks of the first.
    let reporter = joined.control.reporter();
    let sink = Arc::new(move |incoming: Incoming| {
        if let Incoming::Lost { rank, why } = &incoming {
            reporter.lost(*rank, why);
        }
        inbox(incoming);
    });
    let listener = joined.listener.take().expect("a rank connects once");
    Ok(listener.traced(trace).connect(&group, sink)?)
}
