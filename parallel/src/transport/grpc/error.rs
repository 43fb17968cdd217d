//! Why there is no transport.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

/// Why there is no transport.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The port cannot be had.
    #[error("could not listen on {address}: {source}")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The listener or the threads cannot be had.
    #[error("could not start the transport: {0}")]
    Start(#[from] io::Error),
    /// A rank that is not in the table of addresses.
    #[error("rank {rank} of {ranks} ranks: expected a rank below {ranks}")]
    Rank {
        /// This rank.
        rank: usize,
        /// How many addresses there are.
        ranks: usize,
    },
    /// A rank could not be reached.
    #[error("could not reach rank {rank} at {address} within {within:?}: {why}")]
    Unreachable {
        /// Which rank.
        rank: usize,
        /// Its address.
        address: SocketAddr,
        /// How long it was tried.
        within: Duration,
        /// What came of the last try.
        why: String,
    },
    /// A rank was reached, but did not call us.
    #[error("rank {rank} at {address} did not open its stream to rank {here} within {within:?}")]
    Absent {
        /// Which rank.
        rank: usize,
        /// Its address.
        address: SocketAddr,
        /// This rank.
        here: usize,
        /// How long it was waited for.
        within: Duration,
    },
    /// A rank does not want us.
    #[error("rank {rank} at {address} refused the stream of rank {here}: {why}")]
    Refused {
        /// Which rank.
        rank: usize,
        /// Its address.
        address: SocketAddr,
        /// This rank.
        here: usize,
        /// What it said.
        why: String,
    },
    /// A rank was lost before all were connected.
    #[error("rank {rank} at {address} was lost before all ranks were connected: {why}")]
    Lost {
        /// Which rank.
        rank: usize,
        /// Its address.
        address: SocketAddr,
        /// What was seen of it.
        why: String,
    },
}

impl TransportError {
    /// The rank that was not there, if that is what is wrong.
    #[must_use]
    pub const fn lost(&self) -> Option<usize> {
        match self {
            Self::Unreachable { rank, .. } | Self::Absent { rank, .. } | Self::Lost { rank, .. } => Some(*rank),
            _ => None,
        }
    }
}
