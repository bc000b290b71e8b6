//! TLS towards the registry: the ordinary TLS of the web (RFC 8446, RFC 9110 4.3.4), with roots and a name, and
//! where asked with a certificate of ours. It has nothing to do with the identities of the mesh: the registry is
//! no workload. Session resumption is left on, for long connections to few servers.

use std::{io, path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tokio_rustls::{TlsConnector, TlsStream};

use super::credentials::provider_for;
use crate::{model::KeyExchange, net::Stream};

/// Where systems keep their roots.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Reads roots, certificate and key, and makes them ready for handshakes that offer these protocols (ALPN). No
/// roots are those of the system; without `verify` whoever answers is believed.
///
/// # Errors
/// The file that cannot be used, and why.
pub fn registry_client(
    roots: Option<&Path>,
    client: Option<(&Path, &Path)>,
    verify: bool,
    protocols: &[&[u8]],
) -> Result<Arc<ClientConfig>, String> {
    let provider = provider_for(KeyExchange::Classic);
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = if verify {
        let verifier = WebPkiServerVerifier::builder_with_provider(read_roots(roots)?.into(), provider);
        builder.with_webpki_verifier(verifier.build().map_err(|error| error.to_string())?)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(BelieveAnyone(provider)))
    };
    let mut config = match client {
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let key =
                PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{}: {error}", key.display()))?;
            let refused = |error| format!("{}: {error}", certificate.display());
            builder.with_client_auth_cert(chain, key).map_err(refused)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// Secures a connection to a server of this name; gives the stream and the protocol that was agreed on.
///
/// # Errors
/// What the handshake says. The caller sets the time limit.
pub async fn connect_registry(
    stream: Stream,
    config: Arc<ClientConfig>,
    name: &str,
) -> io::Result<(Stream, Option<Vec<u8>>)> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
    let name = ServerName::try_from(name.to_owned()).map_err(invalid)?;
    let tls = TlsConnector::from(config).connect(name, stream).await?;
    let protocol = tls.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    Ok((TlsStream::from(tls).into(), protocol))
}

fn read_roots(file: Option<&Path>) -> Result<RootCertStore, String> {
    let file = match file {
        Some(file) => file,
        None => SYSTEM_ROOTS.iter().map(Path::new).find(|file| file.is_file()).ok_or_else(|| {
            format!("this system has no roots in {}; name a file with roots", SYSTEM_ROOTS.join(", "))
        })?,
    };
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(file)?);
    if added == 0 { Err(format!("{}: no root certificate in PEM", file.display())) } else { Ok(roots) }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| format!("{}: {error}", file.display()))
}

/// For operators who switched the check off.
#[derive(Debug)]
struct BelieveAnyone(Arc<CryptoProvider>);

impl ServerCertVerifier for BelieveAnyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
