//! Partners of sidecars for the tests of trust and of failures: an app that writes down all it hears and can
//! answer badly, and peers that speak TLS with whatever certificate a test has forged. What it prints the tests read.

use std::{
    env,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection,
    SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs::default_provider},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};

/// Longest wait for a word of the other side.
const PATIENCE: Duration = Duration::from_secs(15);
/// How late an answer for the path `/late` is.
const LATE: Duration = Duration::from_millis(300);

const USAGE: &str = "\
mesh-peer app ADDRESS...                          answers HTTP as its path says, echoes anything else
mesh-peer say ADDRESS TEXT                        sends it and prints what comes back
mesh-peer tls-client ADDRESS PEM|none ALPN TEXT   the same over TLS, without looking at the server
mesh-peer tls-server ADDRESS PEM ALPN             takes every client and prints what it sends";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["app", addresses @ ..] => app(addresses),
        ["say", address, text] => say(address, text),
        ["tls-client", address, pem, alpn, text] => tls_client(address, pem, alpn, text),
        ["tls-server", address, pem, alpn] => tls_server(address, pem, alpn),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves each connection in a thread of its own, on all addresses.
fn serve(
    addresses: &[&str],
    handle: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> io::Result<()> {
    let mut servers = Vec::new();
    for address in addresses {
        let listener = TcpListener::bind(address)?;
        let handle = handle.clone();
        servers.push(thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                println!("accepted");
                let handle = handle.clone();
                thread::spawn(move || handle(stream).unwrap_or_else(|error| println!("broke: {error}")));
            }
        }));
    }
    println!("serving");
    servers.into_iter().for_each(|server| drop(server.join()));
    Ok(())
}

fn app(addresses: &[&str]) -> io::Result<()> {
    serve(addresses, |stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut head = Vec::new();
            if reader.read_until(b'\n', &mut head)? == 0 {
                println!("end");
                return Ok(());
            }
            if head[0].is_ascii_control() {
                // as a web server answers TLS
                println!("heard {:?}", String::from_utf8_lossy(&head));
                return (&stream).write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            }
            if !head.trim_ascii_end().ends_with(b"HTTP/1.1") {
                println!("heard {:?}", String::from_utf8_lossy(&head));
                (&stream).write_all(&head)?;
                continue;
            }
            while !head.ends_with(b"\r\n\r\n") && reader.read_until(b'\n', &mut head)? > 0 {}
            let head = String::from_utf8_lossy(&head);
            println!("heard {head:?}");
            if !answer(&stream, &head)? {
                return Ok(());
            }
        }
    })
}

/// Does what the path says; an answer without a fault has the head of the request as its body. Says whether the
/// connection goes on.
fn answer(mut stream: &TcpStream, head: &str) -> io::Result<bool> {
    match head.split(' ').nth(1).unwrap_or_default() {
        "/stall" => {
            // until the other side goes away
            stream.read_to_end(&mut Vec::new())?;
        }
        "/reset" => socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))?,
        "/garbage" => stream.write_all(b"this is no HTTP\r\n\r\n")?,
        "/cut" => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbut ten.\r\n")?,
        "/slow" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")?;
            stream.read_to_end(&mut Vec::new())?;
        }
        // What follows is no HTTP, and lines of that are given back.
        "/upgrade" => {
            stream.write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
            )?;
            return Ok(true);
        }
        path => {
            if path == "/late" {
                stream.set_read_timeout(Some(LATE))?;
                let _ = stream.peek(&mut [0]);
                stream.set_read_timeout(None)?;
            }
            if path == "/lie" {
                stream.write_all(
                    b"HTTP/1.1 200 OK\r\nX-Weft-Failure: app_refused\r\nContent-Length: 0\r\n\r\n",
                )?;
                return Ok(true);
            }
            let fields = path.strip_prefix("/fields/").map_or(Ok(1), str::parse).map_err(io::Error::other)?;
            let more: String = (1..fields).map(|number| format!("X-{number}: y\r\n")).collect();
            write!(stream, "HTTP/1.1 200 OK\r\n{more}Content-Length: {}\r\n\r\n{head}", head.len())?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn dial(address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    println!("connected");
    Ok(stream)
}

/// `\r` and `\n` in the text are line ends. Prints what comes until the end.
fn talk(mut stream: impl Read + Write, text: &str) -> io::Result<()> {
    stream.write_all(text.replace("\\r", "\r").replace("\\n", "\n").as_bytes())?;
    stream.flush()?;
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => println!("answer {:?}", String::from_utf8_lossy(&buffer[..count])),
        }
    }
    println!("closed");
    Ok(())
}

fn say(address: &str, text: &str) -> io::Result<()> {
    talk(dial(address)?, text)
}

fn tls_client(address: &str, pem: &str, alpn: &str, text: &str) -> io::Result<()> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match pem {
        "none" => config.with_no_client_auth(),
        file => {
            let (chain, key) = read_pem(file)?;
            config.with_client_auth_cert(chain, key).map_err(io::Error::other)?
        }
    };
    config.alpn_protocols = names(alpn);
    let mut stream = dial(address)?;
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    let mut session = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    session.complete_io(&mut stream)?;
    println!("handshake done");
    talk(StreamOwned::new(session, stream), text)
}

fn tls_server(address: &str, pem: &str, alpn: &str) -> io::Result<()> {
    let (chain, key) = read_pem(pem)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_client_cert_verifier(Arc::new(Anybody))
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    config.alpn_protocols = names(alpn);
    let config = Arc::new(config);
    serve(&[address], move |mut stream| {
        let mut session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        session.complete_io(&mut stream)?;
        println!("handshake done");
        let mut stream = StreamOwned::new(session, stream);
        let mut buffer = [0; 16 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                count => {
                    println!("heard {:?}", String::from_utf8_lossy(&buffer[..count]));
                    stream.write_all(&buffer[..count])?;
                }
            }
        }
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(default_provider())
}

fn names(alpn: &str) -> Vec<Vec<u8>> {
    alpn.split(',').filter(|name| *name != "none").map(|name| name.as_bytes().to_vec()).collect()
}

fn read_pem(file: &str) -> io::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).map_err(io::Error::other)?.collect();
    let key = PrivateKeyDer::from_pem_file(file).map_err(io::Error::other)?;
    Ok((chain.map_err(io::Error::other)?, key))
}

/// Believes everything.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
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
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Anybody {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}
