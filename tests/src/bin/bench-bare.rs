//! The least that a pair of proxies can be, the peer `bare` of `tests/bench/run`: tokio, hyper and rustls, HTTP/2 with
//! mutual TLS between, one thread each, and nothing around them. No discovery, no retries, no limits, no telemetry:
//! what Weft costs more than this is the price of being a mesh.

use std::{cell::RefCell, net::SocketAddr, path::Path, process::ExitCode, rc::Rc, sync::Arc};

use anyhow::Context;
use http_body_util::Empty;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::{http1 as http1_client, http2 as http2_client},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{RootCertStore, pki_types::ServerName, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    net::{TcpListener, TcpStream},
    task::spawn_local,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const USAGE: &str = "\
bench-bare certificates DIR               a root and one certificate for both sides
bench-bare client DIR LISTEN SERVER READY  HTTP/1 in, HTTP/2 over mutual TLS out
bench-bare server DIR LISTEN APP READY     the other side";
const NAME: &str = "bare.test";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match tokio::task::LocalSet::new().run_until(run(&words)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-bare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["certificates", folder] => make_certificates(Path::new(folder)),
        ["client", folder, listen, server, ready] => {
            spawn_local(say_ready(listener(ready).await?));
            client(Path::new(folder), listen, server.parse()?).await
        }
        ["server", folder, listen, app, ready] => {
            spawn_local(say_ready(listener(ready).await?));
            server(Path::new(folder), listen, app.parse()?).await
        }
        _ => anyhow::bail!("{USAGE}"),
    }
}

async fn listener(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen at {address}"))
}

/// Answers 200 to everything.
async fn say_ready(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let service =
            service_fn(async |_: Request<Incoming>| anyhow::Ok(Response::new(Empty::<Bytes>::new())));
        let _gone = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    }
}

/// Every request goes out on one connection.
async fn client(folder: &Path, listen: &str, server: SocketAddr) -> anyhow::Result<()> {
    let (roots, chain, key) = read_certificates(folder)?;
    let mut config =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let next: Rc<RefCell<Option<http2_client::SendRequest<Incoming>>>> = Rc::default();
    let listener = listener(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        if next.borrow().as_ref().is_none_or(http2_client::SendRequest::is_closed) {
            let stream = TcpStream::connect(server).await?;
            stream.set_nodelay(true)?;
            let stream = connector.connect(ServerName::try_from(NAME)?, stream).await?;
            let (sender, connection) = http2_client::Builder::new(TokioExecutor::new())
                .initial_connection_window_size(1 << 24)
                .handshake(TokioIo::new(stream))
                .await?;
            tokio::spawn(connection);
            *next.borrow_mut() = Some(sender);
        }
        let next = next.clone();
        spawn_local(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let sender = next.borrow().clone();
                async move {
                    anyhow::Ok(sender.context("not connected")?.send_request(towards_http2(request)?).await?)
                }
            });
            let _gone = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// What HTTP/2 needs: an absolute URI and no fields of the connection.
fn towards_http2(request: Request<Incoming>) -> anyhow::Result<Request<Incoming>> {
    let (mut head, body) = request.into_parts();
    let host = head.headers.remove(hyper::header::HOST).context("no Host")?;
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    head.uri =
        hyper::Uri::builder().scheme("http").authority(host.as_bytes()).path_and_query(path).build()?;
    head.version = hyper::Version::HTTP_2;
    head.headers.remove(hyper::header::CONNECTION);
    Ok(Request::from_parts(head, body))
}

/// Idle connections to the app are used again.
async fn server(folder: &Path, listen: &str, app: SocketAddr) -> anyhow::Result<()> {
    let (roots, chain, key) = read_certificates(folder)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build()?;
    let mut config =
        rustls::ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let idle: Idle = Rc::default();
    let listener = listener(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (acceptor, idle) = (acceptor.clone(), idle.clone());
        spawn_local(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(move |request| to_the_app(request, app, idle.clone()));
            let _gone = http2::Builder::new(Local)
                .initial_connection_window_size(1 << 24)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Idle = Rc<RefCell<Vec<http1_client::SendRequest<Incoming>>>>;

async fn to_the_app(
    request: Request<Incoming>,
    app: SocketAddr,
    idle: Idle,
) -> anyhow::Result<Response<Incoming>> {
    let (mut head, body) = request.into_parts();
    let host = head.uri.authority().context("no authority")?.as_str().parse()?;
    head.headers.insert(hyper::header::HOST, host);
    head.uri = head.uri.path_and_query().context("no path")?.as_str().parse()?;
    head.version = hyper::Version::HTTP_11;
    let free = idle.borrow_mut().pop();
    let mut sender = match free {
        Some(sender) => sender,
        None => {
            let stream = TcpStream::connect(app).await?;
            stream.set_nodelay(true)?;
            let (sender, connection) = http1_client::handshake(TokioIo::new(stream)).await?;
            spawn_local(connection);
            sender
        }
    };
    // A connection whose last answer is still being passed on becomes ready when that is done.
    sender.ready().await?;
    let answer = sender.send_request(Request::from_parts(head, body)).await?;
    idle.borrow_mut().insert(0, sender);
    Ok(answer)
}

/// Runs what hyper spawns on this thread.
#[derive(Clone)]
struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

fn make_certificates(folder: &Path) -> anyhow::Result<()> {
    let root_key = rcgen::KeyPair::generate()?;
    let mut root = rcgen::CertificateParams::new(Vec::new())?;
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = rcgen::CertifiedIssuer::self_signed(root, root_key)?;
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec![NAME.to_string()])?.signed_by(&key, &root)?;
    std::fs::write(folder.join("root.pem"), root.pem())?;
    std::fs::write(folder.join("chain.pem"), certificate.pem())?;
    std::fs::write(folder.join("key.pem"), key.serialize_pem())?;
    Ok(())
}

fn read_certificates(
    folder: &Path,
) -> anyhow::Result<(RootCertStore, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("root.pem"))?)?;
    let chain = CertificateDer::pem_file_iter(folder.join("chain.pem"))?.collect::<Result<_, _>>()?;
    Ok((roots, chain, PrivateKeyDer::from_pem_file(folder.join("key.pem"))?))
}
