//! Connections that only processes with the same secret can make: TLS 1.3 with certificates on both sides, signed by an
//! authority that everybody derives from the secret. So nothing else has to travel.
//!
//! - `authority`: from a secret to certificates, and what they are used with.
//! - `connection`: a connection, plain or encrypted.
//! - this file: which of the two it is, and why one cannot be made.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::AlertDescription;
use thiserror::Error;
use tokio::net::ToSocketAddrs;

pub use self::authority::{Keys, SECRET_BYTES, SecretError};
pub use self::connection::Connection;
use super::congestion::Congestion;
use super::socket::{Counters, Line, Socket, words};

mod authority;
mod connection;

/// What keeps strangers out of the connections of a run. All its processes need the same one.
#[derive(Clone, Debug)]
pub enum Security {
    /// Connections are plain, and stay on loopback.
    Loopback,
    /// Connections are plain, and somebody has said that nobody else is on their network.
    TrustedNetwork,
    /// Connections are encrypted, and both sides show that they know the secret.
    Tls(Arc<Keys>),
}

impl Security {
    /// Whether a service may listen at this address.
    #[must_use]
    pub const fn permits(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || !matches!(self, Self::Loopback)
    }

    /// Connects. `line` is told how the connection ended, and what was wrong with the other side.
    ///
    /// # Errors
    ///
    /// Those of the system, or the other side does not fit.
    pub async fn connect(
        &self,
        address: impl ToSocketAddrs,
        counters: Counters,
        line: Arc<Line>,
        congestion: &Congestion,
    ) -> io::Result<Connection> {
        let socket = Socket::connect(address, counters, line.clone(), congestion).await?;
        match self {
            Self::Loopback | Self::TrustedNetwork => Ok(Connection::plain(socket)),
            Self::Tls(keys) => shaken(keys.connect(socket), &line).await,
        }
    }
}

/// The server's part of a handshake. It takes as long as the socket may stay that no service has let in.
pub(super) async fn accept(keys: Arc<Keys>, socket: Socket) -> io::Result<Connection> {
    let line = socket.line().clone();
    shaken(keys.accept(socket), &line).await
}

/// A handshake, whose error is put in plain words.
async fn shaken(handshake: impl Future<Output = io::Result<Connection>>, line: &Line) -> io::Result<Connection> {
    handshake.await.map_err(|error| {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else { return error };
        match Mismatch::of(tls) {
            Some(mismatch) => line.mismatched(mismatch),
            None => io::Error::other(format!("no handshake: {tls}")),
        }
    })
}

/// What is wrong with the other side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Mismatch {
    /// Its certificate is not of our authority, or ours not of its.
    #[error("it has another secret: TRIBUTARY_JOIN_SECRET must be the same for all processes of a run")]
    Secret,
    /// It shows no certificate.
    #[error("it shows no certificate: it is no process of this run")]
    NoCertificate,
    /// It is plain.
    #[error("it does not speak TLS: it needs the TRIBUTARY_JOIN_SECRET of this process, and no --trusted-network")]
    Plain,
    /// It is not.
    #[error("it speaks TLS: this process needs its TRIBUTARY_JOIN_SECRET, and no --trusted-network")]
    Tls,
}

impl Mismatch {
    fn of(error: &rustls::Error) -> Option<Self> {
        use AlertDescription::{BadCertificate, CertificateRequired, CertificateUnknown, DecryptError, UnknownCA};
        match error {
            rustls::Error::InvalidCertificate(_)
            | rustls::Error::AlertReceived(BadCertificate | CertificateUnknown | DecryptError | UnknownCA) => {
                Some(Self::Secret)
            }
            rustls::Error::NoCertificatesPresented | rustls::Error::AlertReceived(CertificateRequired) => {
                Some(Self::NoCertificate)
            }
            rustls::Error::InvalidMessage(_) => Some(Self::Plain),
            _ => None,
        }
    }

    /// Whether another try is in vain. Who is plain may be somebody else, who has the port for a while.
    #[must_use]
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Plain)
    }
}

/// Whether a warning about a failed handshake says anything new: who closes the connection or is out of time is known.
pub(super) fn telling(error: &io::Error) -> Option<String> {
    use io::ErrorKind::{ConnectionReset, TimedOut, UnexpectedEof};
    (!matches!(error.kind(), ConnectionReset | TimedOut | UnexpectedEof)).then(|| words(error))
}

#[cfg(test)]
mod tests;
