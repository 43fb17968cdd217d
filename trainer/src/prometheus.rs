//! Numbers of all ranks for Prometheus: `http://127.0.0.1:PORT/metrics`, served by the process that has them.
//!
//! - `page`: what is served.
//!
//! It listens on loopback alone. A connection carries one request and has a few seconds for it; there is a bound on
//! connections and on what a request may be long. Nothing that comes in changes anything.

mod page;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parallel::coordinator::state::RankNumbers;
use tokio::sync::{Semaphore, oneshot};

use crate::error::{Error, Result};

/// Connections at once; another one is closed at once.
const CONNECTIONS_MAX: usize = 16;
/// The longest head of a request.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long a connection may take, from its begin to the end of the answer.
const WITHIN: Duration = Duration::from_secs(5);
/// After an accept that failed: no file descriptors are left, say.
const PAUSE: Duration = Duration::from_millis(200);

/// Where the numbers come from, whenever somebody asks.
pub type Source = Arc<dyn Fn() -> Vec<RankNumbers> + Send + Sync>;

/// A port that is ours; who connects waits until there are numbers.
#[derive(Debug)]
pub struct Port {
    listener: TcpListener,
    address: SocketAddr,
}

/// The server, until it is dropped.
#[derive(Debug)]
pub struct Endpoint {
    quit: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    /// Takes a port on loopback, if one is wanted; 0 lets the system choose.
    ///
    /// # Errors
    /// It is taken.
    pub fn open(port: Option<u16>) -> Result<Option<Self>> {
        let Some(port) = port else { return Ok(None) };
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let open = || {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(Self { address: listener.local_addr()?, listener })
        };
        let why = |error: std::io::Error| {
            format!("metrics.prometheus_port: {address} cannot be listened at: {error}; choose another, or 0")
        };
        open().map(Some).map_err(|error| Error::Usage(why(error)))
    }

    /// What Prometheus is to ask.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }

    /// Serves these numbers.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn serve(self, source: Source) -> Result<Endpoint> {
        let (quit, quits) = oneshot::channel();
        let start = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            std::thread::Builder::new().name("prometheus".into()).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = quits => {}
                        () = accept(self.listener, source) => {}
                    }
                });
                runtime.shutdown_background();
            })
        };
        let thread = start().map_err(Error::io("start a server in", "this process"))?;
        Ok(Endpoint { quit: Some(quit), thread: Some(thread) })
    }
}

impl Drop for Endpoint {
    /// The port is free when this returns.
    fn drop(&mut self) {
        // The thread may have ended; then there is nobody to tell, and nothing of its panic is worth another one.
        let _ = self.quit.take().map(|quit| quit.send(()));
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the server for Prometheus had died");
            std::mem::forget(panic);
        }
    }
}

async fn accept(listener: TcpListener, source: Source) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!("metrics are not served: {error}"),
    };
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let source = source.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &source);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .keep_alive(false)
                .timer(TokioTimer::new())
                .header_read_timeout(WITHIN)
                .max_buf_size(REQUEST_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), service);
            // What a stranger does wrong is its own business.
            let _ = tokio::time::timeout(WITHIN, connection).await;
            drop(place);
        });
    }
}

fn answer<B>(request: &Request<B>, source: &Source) -> Response<Full<Bytes>> {
    let is_get = request.method() == Method::GET;
    let (status, text) = match (is_get, request.uri().path()) {
        (true, "/metrics") => (StatusCode::OK, page::page(&source())),
        (false, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "GET only\n".into()),
        _ => (StatusCode::NOT_FOUND, "only /metrics is here\n".into()),
    };
    let kind = if status == StatusCode::OK { page::CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let response = Response::builder().status(status).header(CONTENT_TYPE, kind);
    let response = if status == StatusCode::METHOD_NOT_ALLOWED { response.header(ALLOW, "GET") } else { response };
    response.body(Full::new(text.into())).expect("a status and headers that are constants")
}
