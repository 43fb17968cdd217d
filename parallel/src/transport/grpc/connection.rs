//! An HTTP/2 connection to another rank, made by hyper itself: tonic's channel buffers a MiB of what is to be sent, and what
//! a rank sends first should arrive first, be it the last to be ready. Tonic still speaks gRPC on it; but the messages are
//! the connection's own, which are not copied on their way.

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

use super::outbound::Outbox;
use super::{CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, STREAM_WINDOW_BYTES};
use crate::transport::raw::Outgoing;
use crate::transport::raw::service::data_client::DataClient;

/// While so much is buffered no other message is taken. A message is taken whole.
const BUFFER_BYTES_MAX: usize = 128 << 10;

/// A connection for one call.
pub(super) struct Connection {
    sender: SendRequest<Outgoing<Outbox>>,
    /// What is pushed over it; none before it is known, and none any more once the call has it.
    messages: Option<Outbox>,
}

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
        Ok(Self { sender, messages: None })
    }

    /// The service behind it; its one call pushes these messages, in place of those that it is given. The name is only what
    /// the call's header says.
    pub(super) fn client(self, messages: Outbox) -> DataClient<Self> {
        let connection = Self { messages: Some(messages), ..self };
        DataClient::with_origin(connection, Uri::from_static("http://tributary"))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let messages = self.messages.take().expect("a connection is for one call");
        let (parts, _) = request.into_parts();
        Box::pin(self.sender.send_request(Request::from_parts(parts, Outgoing(messages))))
    }
}
