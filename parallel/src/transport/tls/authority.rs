//! From a secret to certificates. HKDF ([RFC 5869](https://www.rfc-editor.org/rfc/rfc5869)) makes the key of an authority
//! of it, the same one in every process. With it a process signs a certificate for a key that it has just drawn, and it
//! believes certificates that this authority signed, and no others.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ED25519,
};
use ring::hkdf;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Connection;
use crate::transport::socket::Socket;

/// How long a secret is. Shorter ones can be guessed; there is no reason for longer ones.
pub const SECRET_BYTES: RangeInclusive<usize> = 16..=4096;

/// Another version of this scheme would have another salt, so that the two never believe each other.
const SALT: &[u8] = b"tributary join secret 1";
/// What is derived.
const INFO: &[u8] = b"authority, ed25519";
/// What stands before the 32 bytes of an Ed25519 key in PKCS #8 ([RFC 8410](https://www.rfc-editor.org/rfc/rfc8410)).
const PKCS8_HEAD: [u8; 16] = *b"\x30\x2e\x02\x01\0\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
/// The name in every certificate. Who it is does not matter, only that it knows the secret.
const NAME: &str = "tributary";
/// HTTP/2.
const ALPN: &[u8] = b"h2";

/// Why there are no keys.
#[derive(Debug, Error)]
pub enum SecretError {
    /// Too short, or far too long.
    #[error(
        "expected a secret of {} to {} bytes, found {bytes}: `openssl rand -hex 32` prints a good one",
        SECRET_BYTES.start(), SECRET_BYTES.end()
    )]
    Length {
        /// How long it is.
        bytes: usize,
    },
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The certificate cannot be used.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// With what a process proves that it knows the secret, and asks others to. The secret itself is not in it.
#[derive(Clone)]
pub struct Keys {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

/// Without the keys.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

impl Keys {
    /// The keys of whoever has this secret.
    ///
    /// # Errors
    ///
    /// The secret is too short or too long, or the system has no random numbers.
    pub fn of(secret: &[u8]) -> Result<Self, SecretError> {
        let authority = Authority::of(secret)?;
        let identity = authority.identity()?;
        let client = client_config(authority.roots()?, &identity)?;
        let server = server_config(authority.roots()?, identity)?;
        Ok(Self { connector: Arc::new(client).into(), acceptor: Arc::new(server).into() })
    }

    /// The part of the side that connects.
    pub(super) async fn connect(&self, socket: Socket) -> io::Result<Connection> {
        let name = ServerName::try_from(NAME).expect("a word is a name");
        Ok(Connection::Tls(Box::new(self.connector.connect(name, socket).await?.into())))
    }

    /// The part of the side that is connected to.
    pub(super) async fn accept(&self, socket: Socket) -> io::Result<Connection> {
        Ok(Connection::Tls(Box::new(self.acceptor.accept(socket).await?.into())))
    }
}

/// Who signs.
pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a process shows of itself.
pub(super) struct Identity {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Authority {
    pub(super) fn of(secret: &[u8]) -> Result<Self, SecretError> {
        if !SECRET_BYTES.contains(&secret.len()) {
            return Err(SecretError::Length { bytes: secret.len() });
        }
        let mut pkcs8 = [0; 48];
        let (head, seed) = pkcs8.split_at_mut(PKCS8_HEAD.len());
        head.copy_from_slice(&PKCS8_HEAD);
        let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, SALT).extract(secret);
        let expanded = extracted.expand(&[INFO], hkdf::HKDF_SHA256);
        expanded.and_then(|expanded| expanded.fill(seed)).expect("one hash is as long as the seed");
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(&pkcs8[..]), &PKCS_ED25519)?;
        // Others see the name and the key of it, and nothing else of this certificate: it is never sent.
        let mut params = params("tributary authority", &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self(CertifiedIssuer::self_signed(params, key)?))
    }

    /// A key that nobody had before, with a certificate.
    pub(super) fn identity(&self) -> Result<Identity, SecretError> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = params(NAME, &[NAME])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.0)?.der().clone();
        Ok(Identity { certificate, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() })
    }

    /// Whom this authority's processes believe.
    pub(super) fn roots(&self) -> Result<RootCertStore, SecretError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone())?;
        Ok(roots)
    }
}

/// Valid from 1975 to 4095: trust rests on the secret alone, and clocks may be wrong.
fn params(common_name: &str, names: &[&str]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names.iter().map(|&name| name.into()).collect::<Vec<String>>())?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = rcgen::date_time_ymd(1975, 1, 1);
    params.not_after = rcgen::date_time_ymd(4095, 1, 1);
    Ok(params)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Neither side keeps a session to resume: every connection shows its certificates.
pub(super) fn client_config(roots: RootCertStore, identity: &Identity) -> Result<ClientConfig, SecretError> {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let chain = vec![identity.certificate.clone()];
    let mut config = builder.with_root_certificates(roots).with_client_auth_cert(chain, identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

pub(super) fn server_config(roots: RootCertStore, identity: Identity) -> Result<ServerConfig, SecretError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let verifier = verifier.build().expect("there is a root, and no list of revocations");
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let chain = vec![identity.certificate];
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, identity.key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}
