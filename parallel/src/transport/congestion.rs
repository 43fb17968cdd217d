//! Which congestion control paces what a rank sends.
//!
//! TCP's is a choice of each connection, and for ours the system's default may be the wrong one. BBR estimates the rate of the
//! link and keeps so much under way as that and the shortest round trip say: between machines of one network, a tenth of a
//! millisecond apart, that is less than a shaper or a switch lets pass at once, and a sender that has nothing to say for a while
//! is taken for a slow link ([Cardwell et al. 2016](https://queue.acm.org/detail.cfm?id=3022184), section on application-limited
//! flows). CUBIC ([RFC 9438](https://www.rfc-editor.org/rfc/rfc9438)) fills what there is. `docs/benchmarks.md` has both.

use std::io;

use socket2::SockRef;
use thiserror::Error;

/// What is taken where nobody says, if the system has it.
const PREFERRED: &str = "cubic";
/// What leaves the choice to the system.
const SYSTEM: &str = "system";

/// Which congestion control the connections of a rank ask for; by default none, which leaves them the system's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Congestion(Option<String>);

/// It cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("expected \"{SYSTEM}\" or {expected}, found {name:?}: {why}")]
pub struct CongestionError {
    name: String,
    expected: String,
    why: String,
}

impl Congestion {
    /// The one of this name, or with `system` what the system would choose. Where nobody says, CUBIC if the system has it.
    ///
    /// # Errors
    /// The system has none of this name, or does not let this process use it.
    pub fn chosen(name: Option<&str>) -> Result<Self, CongestionError> {
        match name {
            Some(SYSTEM) => Ok(Self(None)),
            Some(name) => tried(name).map_err(|error| CongestionError {
                name: name.to_owned(),
                expected: there().map_or_else(|| "one that the system has".into(), |names| format!("one of {names}")),
                why: why(&error),
            }),
            None => Ok(tried(PREFERRED).unwrap_or_else(|error| {
                // What it costs to go without is measured; where the machine has none there is no more to say.
                if error.kind() == io::ErrorKind::PermissionDenied {
                    tracing::warn!("{PREFERRED}: {}; what this rank sends is paced as the system likes", why(&error));
                }
                Self::default()
            })),
        }
    }

    /// One that may not exist.
    #[cfg(test)]
    pub(crate) fn unchecked(name: &str) -> Self {
        Self(Some(name.to_owned()))
    }

    /// Its name, or `system`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.as_deref().unwrap_or(SYSTEM)
    }

    /// Asks for it on a connection.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set<'a>(&self, stream: impl Into<SockRef<'a>>) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |name| ask(&stream.into(), name))
    }
}

/// What the system's answer means here.
fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is none of this name".into(),
        io::ErrorKind::PermissionDenied => {
            "only root may use it, unless net.ipv4.tcp_allowed_congestion_control has it too".into()
        }
        _ => error.to_string(),
    }
}

/// Whether a connection could have it.
fn tried(name: &str) -> io::Result<Congestion> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    ask(&SockRef::from(&socket), name)?;
    Ok(Congestion(Some(name.to_owned())))
}

#[cfg(any(target_os = "freebsd", target_os = "linux"))]
fn ask(socket: &SockRef<'_>, name: &str) -> io::Result<()> {
    socket.set_tcp_congestion(name.as_bytes())
}

#[cfg(not(any(target_os = "freebsd", target_os = "linux")))]
fn ask(_: &SockRef<'_>, _: &str) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "here the system alone chooses"))
}

/// Those that the system names.
fn there() -> Option<String> {
    let names = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").ok()?;
    Some(names.split_whitespace().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_system_has_is_refused_with_what_there_is() {
        let error = Congestion::chosen(Some("tortoise")).expect_err("nobody has that").to_string();
        assert!(error.starts_with("expected \"system\" or one"), "{error}");
        assert!(error.contains("found \"tortoise\": "), "{error}");
        if cfg!(target_os = "linux") {
            assert!(error.contains("reno") && error.ends_with(": there is none of this name"), "{error}");
        }
        assert_eq!(Congestion::chosen(Some("")).expect_err("no name").name, "");
    }

    #[test]
    fn the_systems_own_choice_asks_for_nothing() {
        let system = Congestion::chosen(Some("system")).expect("always there");
        assert_eq!((system.name(), &system), ("system", &Congestion::default()));
    }

    /// Linux always has `reno`, and lets everybody use it.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_connection_has_what_it_asked_for() {
        let of = |socket: &std::net::TcpStream| {
            let name = SockRef::from(socket).tcp_congestion().expect("Linux tells");
            String::from_utf8(name).expect("a name").trim_end_matches('\0').to_owned()
        };
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let connect = || std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("it listens");
        let before = of(&connect());
        for (asked, got) in [(Some("reno"), "reno"), (Some("system"), before.as_str())] {
            let stream = connect();
            Congestion::chosen(asked).expect("it is there").set(&stream).expect("it is there");
            assert_eq!(of(&stream), got);
        }
        let (unsaid, stream) = (Congestion::chosen(None).expect("never refused"), connect());
        unsaid.set(&stream).expect("it is there");
        assert_eq!(of(&stream), if unsaid.name() == "system" { before } else { PREFERRED.to_owned() });
        let names = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").expect("Linux tells");
        assert!(unsaid.name() == PREFERRED || !names.split_whitespace().any(|name| name == PREFERRED), "{names}");
    }
}
