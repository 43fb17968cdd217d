use std::time::Duration;

use rustls::version::TLS13;
use rustls::{ClientConfig, ProtocolVersion, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::authority::{Authority, client_config, server_config};
use super::*;

/// Only a guard: nothing here takes so long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

const ONE: &[u8] = b"the secret of one run";
const TWO: &[u8] = b"the secret of two runs";

/// A process that believes one secret's authority, and shows a certificate of another's.
fn client(believes: &[u8], shows: &[u8]) -> ClientConfig {
    let identity = Authority::of(shows).expect("long enough").identity().expect("a certificate");
    client_config(Authority::of(believes).expect("long enough").roots().expect("a root"), &identity).expect("it fits")
}

fn server(secret: &[u8]) -> ServerConfig {
    let authority = Authority::of(secret).expect("long enough");
    server_config(authority.roots().expect("a root"), authority.identity().expect("a certificate")).expect("it fits")
}

/// Both ends of a handshake and of a byte each way, and what each found wrong with the other.
fn shake(client: ClientConfig, server: ServerConfig) -> [Result<(), Option<Mismatch>>; 2] {
    let wrong = |error: io::Error| error.get_ref().and_then(|inner| Mismatch::of(inner.downcast_ref()?));
    let (here, there) = tokio::io::duplex(1 << 16);
    let calls = async {
        let mut stream =
            TlsConnector::from(Arc::new(client)).connect("tributary".try_into().expect("a name"), here).await?;
        let session = stream.get_ref().1;
        assert_eq!(session.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
        stream.write_all(b"x").await?;
        stream.read_exact(&mut [0]).await.map(drop)
    };
    let answers = async {
        let mut stream = TlsAcceptor::from(Arc::new(server)).accept(there).await?;
        stream.read_exact(&mut [0]).await?;
        stream.write_all(b"y").await?;
        stream.flush().await
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let both = async { tokio::join!(calls, answers) };
    let (calls, answers) = runtime.block_on(async { timeout(HANG, both).await.expect("no hang") });
    [calls.map_err(wrong), answers.map_err(wrong)]
}

#[test]
fn who_has_the_same_secret_is_believed_and_who_has_another_is_not() {
    assert_eq!(shake(client(ONE, ONE), server(ONE)), [Ok(()), Ok(())]);
    assert_eq!(shake(client(TWO, TWO), server(TWO)), [Ok(()), Ok(())]);
    assert_eq!(shake(client(TWO, TWO), server(ONE)), [Err(Some(Mismatch::Secret)); 2]);
    // Whoever would believe anybody is not believed by the server.
    let [_, answers] = shake(client(ONE, TWO), server(ONE));
    assert_eq!(answers, Err(Some(Mismatch::Secret)));
    // And whoever shows nothing.
    let roots = Authority::of(ONE).expect("long enough").roots().expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).expect("it has it");
    let mut bare = builder.with_root_certificates(roots).with_no_client_auth();
    bare.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(shake(bare, server(ONE)), [Err(Some(Mismatch::NoCertificate)); 2]);
}

#[test]
fn two_processes_draw_keys_of_their_own_under_one_authority() {
    let authority = || Authority::of(ONE).expect("long enough");
    let (one, two) = (authority(), authority());
    let root = |authority: &Authority| authority.roots().expect("a root").roots[0].subject_public_key_info.to_vec();
    assert_eq!(root(&one), root(&two));
    assert_ne!(root(&one), root(&Authority::of(TWO).expect("long enough")));
    let [one, two] = [one, two].map(|authority| authority.identity().expect("a certificate"));
    assert_ne!(one.certificate, two.certificate);
    assert_ne!(one.key.secret_der(), two.key.secret_der());
    assert!(!one.key.secret_der().windows(ONE.len()).any(|window| window == ONE));
}

/// The public key that Python's `hmac` and OpenSSL derive from [`ONE`]: HMAC-SHA256 twice, and `openssl pkey`.
#[test]
fn the_authority_is_what_hkdf_and_ed25519_make_of_the_secret() {
    let roots = Authority::of(ONE).expect("long enough").roots().expect("a root");
    let key = &roots.roots[0].subject_public_key_info;
    let hex = key[key.len() - 32..].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex, "7cbd1ffa96fba3979e0e86e39be391781d1d7043ef2eb4742d490afd402a7325");
}

#[test]
fn a_secret_has_a_length() {
    for bytes in [0, 15, 4097] {
        let error = Keys::of(&vec![b'x'; bytes]).expect_err("not so long").to_string();
        let said =
            format!("expected a secret of 16 to 4096 bytes, found {bytes}: `openssl rand -hex 32` prints a good one");
        assert_eq!(error, said);
    }
    for bytes in [16, 4096] {
        Keys::of(&vec![b'x'; bytes]).expect("as long as that");
    }
}

#[test]
fn only_loopback_is_open_to_whoever_has_neither_secret_nor_flag() {
    let keys = Security::Tls(Arc::new(Keys::of(ONE).expect("long enough")));
    for (address, loopback) in [("127.0.0.1", true), ("::1", true), ("0.0.0.0", false), ("10.0.0.1", false)] {
        let ip = address.parse().expect("an address");
        assert_eq!(Security::Loopback.permits(ip), loopback, "{address}");
        assert!(Security::TrustedNetwork.permits(ip) && keys.permits(ip), "{address}");
    }
}
