//! An S3 server on loopback, in this process, whose bucket is a folder. A test may look at every request, and say what becomes
//! of it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// Who may in.
const KEY: (&str, &str) = ("AKIDTEST", "a-secret-of-the-test");
/// The bucket.
pub const BUCKET: &str = "checkpoints";

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// How many came before it, since the rule was made.
    pub number: usize,
    pub method: String,
    /// The path below the bucket, and the query.
    pub path: String,
    pub query: String,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// Refused with this status; nothing is done.
    Refuse(u16),
    /// Done, and then answered like a refused one: nobody learns that it was done.
    DoAndRefuse(u16),
    /// Kept until [`Server::release`].
    Hold,
}

type Rule = Box<dyn Fn(&Asked) -> Fate + Send>;

struct Gate {
    google: bool,
    rule: Mutex<Rule>,
    log: Mutex<Vec<Asked>>,
    held: watch::Sender<bool>,
}

pub struct Server {
    root: TempDir,
    scheme: &'static str,
    /// Whether it plays Google's.
    google: bool,
    address: SocketAddr,
    gate: Arc<Gate>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn new() -> Self {
        Self::start("http", None, false)
    }

    /// One for the client of Google's store: the requests of its XML interface are those of S3, but for the token that says who may
    /// in.
    pub fn google() -> Self {
        Self::start("http", None, true)
    }

    /// One that speaks TLS, with a certificate by an authority of its own, whose certificate comes with it.
    pub fn with_tls() -> (Self, String) {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
        let own = params.signed_by(&key, &authority).expect("a certificate");
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![own.der().clone()], key);
        let acceptor = TlsAcceptor::from(Arc::new(config.expect("the key is the certificate's")));
        (Self::start("https", Some(acceptor), false), pem(authority.der()))
    }

    fn start(scheme: &'static str, tls: Option<TlsAcceptor>, google: bool) -> Self {
        let root = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(root.path().join(BUCKET)).expect("writable");
        let gate = Arc::new(Gate {
            google,
            rule: Mutex::new(Box::new(|_| Fate::Pass)),
            log: Mutex::default(),
            held: watch::channel(true).0,
        });
        let mut builder = S3ServiceBuilder::new(FileSystem::new(root.path()).expect("a folder"));
        if !google {
            builder.set_auth(SimpleAuth::from_single(KEY.0, KEY.1));
        }
        let (service, shared) = (builder.build(), gate.clone());
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
                tell.send(listener.local_addr().expect("bound")).expect("somebody waits");
                tokio::select! {
                    () = serve(listener, tls, service, shared) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        let address = told.recv().expect("it listens");
        Self { root, scheme, google, address, gate, stop: Some(stop), thread: Some(thread) }
    }

    /// From now on requests are counted anew, and the rule says what becomes of them.
    pub fn rule(&self, rule: impl Fn(&Asked) -> Fate + Send + 'static) {
        *lock(&self.gate.rule) = Box::new(rule);
        lock(&self.gate.log).clear();
    }

    /// What was asked since the rule was made.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.gate.log).clone()
    }

    /// Lets go what is held, and holds nothing any more.
    pub fn release(&self) {
        self.gate.held.send_replace(false);
    }

    /// What the environment of a process must have.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("{}://{}", self.scheme, self.address);
        let google = [
            ("GOOGLE_BASE_URL", &*endpoint),
            ("GOOGLE_ALLOW_HTTP", "true"),
            ("GOOGLE_BEARER_TOKEN", KEY.1),
            ("NO_PROXY", "127.0.0.1"),
        ];
        let pairs = [
            ("AWS_ENDPOINT_URL", &*endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", KEY.0),
            ("AWS_SECRET_ACCESS_KEY", KEY.1),
            ("AWS_REGION", "us-east-1"),
            // Loopback is not behind anybody's proxy.
            ("NO_PROXY", "127.0.0.1"),
        ];
        let pairs = if self.google { &google[..] } else { &pairs };
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// The URL of a place in the bucket.
    pub fn url(&self, below: &str) -> String {
        format!("{}://{BUCKET}/{below}", if self.google { "gs" } else { "s3" })
    }

    /// An object, as the file that it is.
    pub fn file(&self, key: &str) -> PathBuf {
        self.root.path().join(BUCKET).join(key)
    }

    /// The keys of all objects, sorted.
    pub fn keys(&self) -> Vec<String> {
        fn walk(folder: &std::path::Path, prefix: &str, keys: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                match entry.path().is_dir() {
                    true => walk(&entry.path(), &format!("{name}/"), keys),
                    false => keys.push(name),
                }
            }
        }
        let mut keys = Vec::new();
        walk(&self.root.path().join(BUCKET), "", &mut keys);
        keys.sort();
        keys
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.release();
        _ = self.stop.take().map(|stop| stop.send(()));
        _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A certificate as the text in which systems keep them.
fn pem(der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----");
    for (index, three) in der.chunks(3).enumerate() {
        text += if index % 16 == 0 { "\n" } else { "" };
        let bits = three.iter().enumerate().fold(0, |bits, (index, &byte)| bits | u32::from(byte) << (16 - 8 * index));
        let digit = |place: usize| char::from(DIGITS[(bits >> (18 - 6 * place)) as usize & 63]);
        (0..4).for_each(|place| text.push(if place <= three.len() { digit(place) } else { '=' }));
    }
    text + "\n-----END CERTIFICATE-----\n"
}

/// A connection, plain or encrypted.
trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, service: S3Service, gate: Arc<Gate>) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { continue };
        let (tls, service, gate) = (tls.clone(), service.clone(), gate.clone());
        tokio::spawn(async move {
            let socket: Box<dyn Socket> = match tls {
                None => Box::new(socket),
                Some(tls) => match tls.accept(socket).await {
                    Ok(socket) => Box::new(socket),
                    // A client that trusts nobody.
                    Err(_) => return,
                },
            };
            let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
                let (service, gate) = (service.clone(), gate.clone());
                async move { answer(&service, &gate, request).await }
            });
            let mut http = hyper::server::conn::http1::Builder::new();
            // Whoever goes away in the middle of a request is no fault of the server.
            let _ = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), answer).await;
        });
    }
}

async fn answer(
    service: &S3Service,
    gate: &Gate,
    mut request: Request<hyper::body::Incoming>,
) -> Result<Response<Body>, HttpError> {
    let path = request.uri().path().trim_start_matches('/');
    let path = path.strip_prefix(BUCKET).unwrap_or(path).trim_start_matches('/').to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let fate = {
        let mut log = lock(&gate.log);
        let asked = Asked { number: log.len(), method: request.method().to_string(), path, query };
        log.push(asked.clone());
        drop(log);
        lock(&gate.rule)(&asked)
    };
    let refused = |status: u16| {
        let text = "<Error><Code>Refused</Code><Message>by the test</Message></Error>".to_owned();
        let mut response = Response::new(Body::from(text));
        *response.status_mut() = StatusCode::from_u16(status).expect("a status");
        Ok(response)
    };
    // What is not signed S3's server takes, without a token that it does not know.
    if gate.google {
        let token = request.headers_mut().remove("authorization");
        if token.is_none_or(|token| token.as_bytes() != format!("Bearer {}", KEY.1).as_bytes()) {
            return refused(401);
        }
    }
    match fate {
        Fate::Pass => {}
        Fate::Refuse(status) => return refused(status),
        Fate::DoAndRefuse(status) => {
            service.call(request.map(Body::from)).await?;
            return refused(status);
        }
        Fate::Hold => {
            let mut held = gate.held.subscribe();
            let _ = held.wait_for(|held| !held).await;
        }
    }
    service.call(request.map(Body::from)).await
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
