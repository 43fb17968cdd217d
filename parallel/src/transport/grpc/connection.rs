//! An HTTP/2 connection to another rank, made by hyper itself: tonic's channel buffers a MiB of what is to be sent, and what
//! a rank sends first should arrive first, be it the last to be ready.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};
use tower::Service;

use super::{CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, STREAM_WINDOW_BYTES};
use crate::transport::raw::service::data_client::DataClient;

/// While so much is buffered no other message is taken. A message is taken whole.
const BUFFER_BYTES_MAX: usize = 128 << 10;

/// A connection, which ends with the last clone.
#[derive(Clone, Debug)]
pub(super) struct Connection(SendRequest<Body>);

/// What may go wrong with it.
pub(super) type Fault = Box<dyn Error + Send + Sync>;

impl Connection {
    /// Begins to speak HTTP/2. A task of the runtime carries what is sent and received.
    ///
    /// # Errors
    /// The other side does not answer in kind.
    pub(super) async fn over(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Self, Fault> {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_send_buf_size(BUFFER_BYTES_MAX);
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
        tokio::spawn(async move {
            // Whoever calls hears of it.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to another rank has ended");
            }
        });
        Ok(Self(sender))
    }

    /// The service behind it. The name is only what the call's header says.
    pub(super) fn client(self) -> DataClient<Self> {
        DataClient::with_origin(self, Uri::from_static("http://tributary"))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
