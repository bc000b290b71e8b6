//! The certificate authority as a process, and the sidecar's identity room as its client: what is given, what
//! is refused, what stays when one of them goes away.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use weft_proto::{
    ca::{
        IssueRequest, IssueResponse, WatchBundleRequest,
        certificate_authority_client::CertificateAuthorityClient,
    },
    certificate::Leaf,
};
use weft_sidecar::{
    config::{Authority as Settings, Pin},
    identity::{self, Status},
    model::KeyExchange,
    tls::{Alpn, Anchor, Credentials, accept, connect, connect_authority},
};
use weft_tests::{Need, can_run, program, python};

#[path = "authority/dns_names.rs"]
mod dns_names;

const WEB: &str = "spiffe://weft.local/ns/shop/sa/web";
const ORDERS: &str = "spiffe://weft.local/ns/shop/sa/orders";
/// Longest wait for what should come at once.
const SOON: Duration = Duration::from_secs(10);

/// A directory of an authority, and the files that tests put beside it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let home = Home(tempfile::tempdir().unwrap());
        let made = home.command(&["init", "--trust-domain", "weft.local"]);
        assert!(made.status.success(), "{}", error_of(&made));
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn dir(&self) -> PathBuf {
        self.path("ca")
    }

    /// Runs a command of weft-ca on this directory.
    fn command(&self, arguments: &[&str]) -> Output {
        Command::new(program("weft-ca")).args(arguments).arg("--dir").arg(self.dir()).output().unwrap()
    }

    fn root(&self) -> Value {
        let shown = self.command(&["root", "--json"]);
        assert!(shown.status.success(), "{}", error_of(&shown));
        serde_json::from_slice(&shown.stdout).unwrap()
    }

    /// Makes a token and puts it into a file.
    fn token(&self, identity: &str, more: &[&str]) -> PathBuf {
        let path = self.path(&format!("token-{}", fastrand::u64(..)));
        let out = path.to_str().unwrap();
        let made = self.command(&[&["token", "create", "--identity", identity, "--out", out], more].concat());
        assert!(made.status.success(), "{}", error_of(&made));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        path
    }

    fn settings(&self, at: SocketAddr, token_file: &Path) -> Settings {
        let pin = self.path("root-to-pin.pem");
        fs::copy(self.dir().join("roots.pem"), &pin).unwrap();
        Settings {
            address: at.to_string(),
            pin: Pin::File(pin),
            token_file: Some(token_file.to_owned()),
            state_dir: None,
            lifetime: None,
            key_exchange: KeyExchange::default(),
        }
    }

    fn audit(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("audit")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A running weft-ca; killed when it goes out of scope.
struct Serving {
    process: Child,
    listen: SocketAddr,
    admin: SocketAddr,
}

impl Serving {
    async fn start(home: &Home, more: &[&str]) -> Self {
        Self::start_at(home, "127.0.0.1:0".parse().unwrap(), more).await
    }

    async fn start_at(home: &Home, listen: SocketAddr, more: &[&str]) -> Self {
        let log = fs::File::options().create(true).append(true).open(home.path("log")).unwrap();
        Self::run(home, Command::new(program("weft-ca")), log.into(), listen, more).await
    }

    /// After these lines of a shell, for example about limits.
    async fn start_after(home: &Home, shell: &str, errors: Stdio, more: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{shell}; exec \"$@\""), "sh"]).arg(program("weft-ca"));
        Self::run(home, command, errors, "127.0.0.1:0".parse().unwrap(), more).await
    }

    async fn run(
        home: &Home,
        mut command: Command,
        errors: Stdio,
        listen: SocketAddr,
        more: &[&str],
    ) -> Self {
        let addresses = home.path("addresses");
        let _ = fs::remove_file(&addresses);
        let mut process = command
            .args(["serve", "--admin", "127.0.0.1:0", "--listen", &listen.to_string()])
            .arg("--dir")
            .arg(home.dir())
            .arg("--address-file")
            .arg(&addresses)
            .arg("--audit")
            .arg(home.path("audit"))
            .args(more)
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .unwrap();
        let began = Instant::now();
        while !addresses.exists() {
            assert!(
                process.try_wait().unwrap().is_none(),
                "{}",
                fs::read_to_string(home.path("log")).unwrap_or_default()
            );
            assert!(began.elapsed() < SOON, "weft-ca does not start");
            sleep(Duration::from_millis(20)).await;
        }
        let text: Value = serde_json::from_slice(&fs::read(&addresses).unwrap()).unwrap();
        let address = |name: &str| text[name].as_str().unwrap().parse().unwrap();
        Serving { listen: address("listen"), admin: address("admin"), process }
    }

    fn signal(&self, signal: Signal) {
        let id = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
        nix::sys::signal::kill(id, signal).unwrap();
    }

    /// SIGTERM, and the exit code.
    async fn terminate(self) -> Option<i32> {
        self.end_by(Signal::SIGTERM).await
    }

    /// This signal, and the exit code.
    async fn end_by(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        let began = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < Duration::from_secs(15), "weft-ca does not stop");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// GET on the admin port: the status line and the body.
    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: ca\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A running identity room; ended when it goes out of scope.
struct Workload {
    task: JoinHandle<()>,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    status: watch::Receiver<Status>,
}

impl Workload {
    fn start(settings: Settings) -> Self {
        let (publish, credentials) = watch::channel(None);
        let (report, status) = watch::channel(Status::default());
        let task = tokio::spawn(identity::run(settings, publish, report, fastrand::Rng::with_seed(7)));
        Workload { task, credentials, status }
    }

    /// The credentials, once they satisfy this.
    async fn wait(&mut self, within: Duration, wanted: impl Fn(&Credentials) -> bool) -> Arc<Credentials> {
        let found =
            timeout(within, self.credentials.wait_for(|held| held.as_deref().is_some_and(&wanted))).await;
        match found {
            Ok(held) => held.unwrap().clone().unwrap(),
            Err(_) => panic!("no such credentials within {within:?}; status {:?}", self.status.borrow()),
        }
    }

    async fn identified(&mut self) -> Arc<Credentials> {
        self.wait(SOON, |_| true).await
    }

    async fn error(&mut self) -> String {
        let found = timeout(SOON, self.status.wait_for(|status| status.last_error.is_some())).await;
        found.expect("no error came").unwrap().last_error.clone().unwrap()
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client that says what it likes; the authority is checked as always.
async fn client(
    home: &Home,
    at: SocketAddr,
    shown: Option<&Credentials>,
) -> CertificateAuthorityClient<Channel> {
    let root = CertificateDer::from_pem_file(home.dir().join("roots.pem")).unwrap();
    let tcp = TcpStream::connect(at).await.unwrap();
    let (stream, _) =
        connect_authority(tcp.into(), vec![Anchor::Roots(vec![root])], shown, KeyExchange::default())
            .await
            .unwrap();
    let mut once = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        std::future::ready(once.take().ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)))
    });
    let channel = Endpoint::from_static("http://ca").connect_with_connector(connector).await.unwrap();
    CertificateAuthorityClient::new(channel)
}

/// One Issue call.
async fn issue(
    home: &Home,
    at: SocketAddr,
    shown: Option<&Credentials>,
    request: IssueRequest,
) -> Result<IssueResponse, tonic::Status> {
    let answer = client(home, at, shown).await.issue(request).await;
    answer.map(tonic::Response::into_inner)
}

fn request(token: &Path) -> IssueRequest {
    request_for(&KeyPair::generate().unwrap(), token)
}

fn request_for(key: &KeyPair, token: &Path) -> IssueRequest {
    let csr = CertificateParams::default().serialize_request(key).unwrap();
    let join_token = fs::read_to_string(token).unwrap();
    IssueRequest { csr: csr.der().to_vec(), join_token, lifetime_seconds: 0, dns_names: Vec::new() }
}

#[tokio::test]
async fn two_workloads_get_identities_by_token_and_meet() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    assert!(serving.get("/live").await.starts_with("HTTP/1.1 200"));
    assert!(serving.get("/ready").await.contains("ready"));
    assert!(serving.get("/").await.starts_with("HTTP/1.1 404"));
    let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
    let mut orders = Workload::start(Settings {
        pin: Pin::Sha256(
            (0..32)
                .map(|at| {
                    let root = home.root();
                    let text = root["root_sha256"].as_str().unwrap();
                    u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()
                })
                .collect::<Vec<u8>>()
                .try_into()
                .unwrap(),
        ),
        ..home.settings(serving.listen, &home.token(ORDERS, &["--reusable"]))
    });
    let (web, orders) = (web.identified().await, orders.identified().await);
    assert_eq!((web.id().as_str(), orders.id().as_str()), (WEB, ORDERS));
    let left = web.remaining(SystemTime::now());
    assert!(left > Duration::from_secs(23 * 3600) && left <= Duration::from_secs(24 * 3600), "{left:?}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let expected = [orders.id().clone()];
    let (near, far) =
        tokio::join!(connect(near.into(), &web, &expected, Alpn::Tcp), accept(far.into(), &orders));
    assert_eq!((near.unwrap().1.id().as_str(), far.unwrap().1.id().as_str()), (ORDERS, WEB));

    let audit = home.audit();
    assert_eq!(audit.len(), 2);
    let line = audit.iter().find(|line| line["identity"] == WEB).unwrap();
    assert_eq!((&line["event"], &line["proof"]), (&"issued".into(), &"token".into()));
    assert_eq!(line["serial"], web.serial());
    assert_eq!(line["public_key_sha256"].as_str().unwrap().len(), 64);
    assert!(line["not_after"].is_string() && line["address"].is_string() && line["token"].is_string());
    assert!(serving.get("/metrics").await.contains(r#"weft_ca_issued_total{proof="token"} 2"#));
}

#[tokio::test]
async fn a_single_use_token_is_good_once_even_for_many_at_a_time() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let token = home.token(WEB, &[]);
    let asked = (0..8).map(|_| issue(&home, serving.listen, None, request(&token)));
    let answers = futures(asked).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    for status in answers.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(!status.message().contains("already"), "a stranger learns that there was such a token");
    }
    let mut late = Workload::start(home.settings(serving.listen, &token));
    assert!(late.error().await.contains("Unauthenticated"));
    let audit = home.audit();
    assert_eq!(audit.iter().filter(|line| line["event"] == "issued").count(), 1);
    let refused: Vec<_> = audit.iter().filter(|line| line["event"] == "refused").collect();
    assert!(refused.len() >= 8);
    assert!(refused.iter().all(|line| line["detail"].as_str().unwrap().contains("already used")));
    let listed = String::from_utf8(home.command(&["token", "list"]).stdout).unwrap();
    assert!(listed.contains("used") && listed.contains(WEB), "{listed}");
    assert!(serving.get("/metrics").await.contains(r#"weft_ca_refused_total{reason="bad_token"}"#));
}

/// All at the same time, in order.
async fn futures<F: Future<Output: Send + 'static> + Send>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = all.map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = pending.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, slot) in pending.iter_mut().zip(&mut done) {
            if slot.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *slot = Some(value);
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test]
async fn expired_revoked_and_invented_tokens_are_refused() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let (expired, revoked) = (home.token(WEB, &["--expires", "1s"]), home.token(WEB, &["--reusable"]));
    assert!(issue(&home, serving.listen, None, request(&revoked)).await.is_ok());
    let name = home.audit()[0]["token"].as_str().unwrap().to_owned();
    let taken_back = Command::new(program("weft-ca"))
        .args(["token", "revoke", &name, "--dir"])
        .arg(home.dir())
        .output()
        .unwrap();
    assert!(taken_back.status.success(), "{}", error_of(&taken_back));
    let invented = home.path("invented");
    fs::write(&invented, format!("weft-token-{}", "0".repeat(64))).unwrap();
    sleep(Duration::from_millis(1100)).await;
    for (token, reason) in [(&expired, "expired"), (&revoked, "unknown"), (&invented, "unknown")] {
        let status = issue(&home, serving.listen, None, request(token)).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        let audit = home.audit();
        let line = audit.last().unwrap();
        assert!(line["detail"].as_str().unwrap().contains(reason), "{line}");
        assert_eq!((&line["event"], &line["reason"]), (&"refused".into(), &"bad_token".into()));
    }
    let text = fs::read_to_string(home.path("audit")).unwrap();
    assert!(!text.contains("weft-token-"), "the audit shows a token");
}

#[tokio::test]
async fn only_the_proven_identity_is_given_whatever_the_request_says() {
    let home = Home::new();
    let serving = Serving::start(&home, &["--max-lifetime", "48h"]).await;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        SanType::URI(ORDERS.try_into().unwrap()),
        SanType::URI("spiffe://weft.local/ns/weft/sa/weft-ca".try_into().unwrap()),
        SanType::DnsName("orders.example".try_into().unwrap()),
    ];
    params.distinguished_name.push(DnType::CommonName, "root of all");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let csr = params.serialize_request(&key).unwrap().der().to_vec();
    let token = home.token(WEB, &[]);
    let asked = IssueRequest { csr, lifetime_seconds: u32::MAX, ..request(&token) };
    let answer = issue(&home, serving.listen, None, asked).await.unwrap();
    let leaf = Leaf::parse(&answer.chain[0]).unwrap();
    assert_eq!(leaf.id.as_str(), WEB);
    assert!(leaf.not_after <= SystemTime::now() + Duration::from_secs(48 * 3600));
    let text = String::from_utf8_lossy(&answer.chain[0]).into_owned();
    assert!(!text.contains("orders") && !text.contains("root of all"), "the request leaked into it");

    let own = home.command(&["token", "create", "--identity", "spiffe://weft.local/ns/weft/sa/weft-ca"]);
    assert_eq!(own.status.code(), Some(2), "a token for the authority's own identity");
    let foreign = home.command(&["token", "create", "--identity", "spiffe://evil.example/ns/a/sa/b"]);
    assert!(error_of(&foreign).contains("trust domain"), "{}", error_of(&foreign));

    let refused = [
        (IssueRequest { csr: vec![1, 2, 3], ..request(&token) }, Code::InvalidArgument),
        (IssueRequest { lifetime_seconds: 1, ..request(&token) }, Code::InvalidArgument),
        (IssueRequest { join_token: String::new(), ..request(&token) }, Code::Unauthenticated),
        (IssueRequest { csr: vec![0; 100_000], ..request(&token) }, Code::OutOfRange),
    ];
    for (asked, code) in refused {
        let status = issue(&home, serving.listen, None, asked).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
}

#[tokio::test]
async fn a_bad_request_does_not_use_up_the_token() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let token = home.token(WEB, &[]);
    let bad = IssueRequest { csr: vec![0], ..request(&token) };
    assert!(issue(&home, serving.listen, None, bad).await.is_err());
    assert!(issue(&home, serving.listen, None, request(&token)).await.is_ok());
}

#[tokio::test]
async fn a_restart_keeps_the_root_and_a_certificate_from_before_is_renewed_after() {
    let home = Home::new();
    let before = home.root();
    let serving = Serving::start(&home, &[]).await;
    let listen = serving.listen;
    let mut web = Workload::start(home.settings(listen, &home.token(WEB, &[])));
    let credentials = web.identified().await;
    // The stream of the bundle stands: the stop must not wait for it.
    sleep(Duration::from_millis(300)).await;
    assert!(serving.get("/metrics").await.contains("weft_ca_watchers 1"));
    assert_eq!(serving.terminate().await, Some(0));

    let serving = Serving::start_at(&home, listen, &[]).await;
    assert_eq!(home.root(), before);
    let renewal = IssueRequest { join_token: String::new(), ..request(&home.token(WEB, &[])) };
    let answer = issue(&home, serving.listen, Some(&credentials), renewal).await.unwrap();
    assert_eq!(Leaf::parse(&answer.chain[0]).unwrap().id.as_str(), WEB);
    let audit = home.audit();
    let line = audit.last().unwrap();
    assert_eq!(
        (&line["proof"], &line["proof_serial"]),
        (&"certificate".into(), &credentials.serial().into())
    );
}

#[tokio::test]
async fn state_that_others_may_read_or_that_is_incomplete_is_refused_and_left_alone() {
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let serve = |home: &Home| {
        home.command(&[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--init",
            "--trust-domain",
            "a",
        ])
    };
    for (name, wide, cure) in [
        ("", 0o755, "chmod 0700"),
        ("root.pem", 0o644, "chmod 0600"),
        ("issuing.pem", 0o640, "chmod 0600"),
        ("roots.pem", 0o604, "chmod 0600"),
    ] {
        let home = Home::new();
        mode(&home.dir().join(name), wide);
        let output = serve(&home);
        assert_eq!(output.status.code(), Some(2));
        assert!(error_of(&output).contains(cure), "{name}: {}", error_of(&output));
    }
    for name in ["root.pem", "roots.pem"] {
        let home = Home::new();
        fs::remove_file(home.dir().join(name)).unwrap();
        let output = serve(&home);
        assert_eq!(output.status.code(), Some(2));
        let error = error_of(&output);
        assert!(error.contains(name) && error.contains("backup"), "{error}");
        assert!(!home.dir().join(name).exists(), "{name} was made anew");
    }
    let home = Home::new();
    let again = home.command(&["init", "--trust-domain", "weft.local"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(error_of(&again).contains("not empty"));
}

/// The root of an authority, to sign with.
fn root_of(home: &Home) -> Issuer<'static, KeyPair> {
    let pem = fs::read_to_string(home.dir().join("root.pem")).unwrap();
    let key_at = pem.find("-----BEGIN PRIVATE KEY").unwrap();
    Issuer::from_ca_cert_pem(&pem[..key_at], KeyPair::from_pem(&pem[key_at..]).unwrap()).unwrap()
}

/// A TLS server that takes anyone and writes down what it is told.
async fn recorder(
    home: &Home,
    issuer: &Issuer<'_, KeyPair>,
) -> (SocketAddr, Arc<Mutex<Vec<u8>>>, JoinHandle<()>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "a server");
    params.subject_alt_names =
        vec![SanType::URI("spiffe://weft.local/ns/weft/sa/weft-ca".try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let leaf = params.signed_by(&key, issuer).unwrap().der().clone();
    let root = CertificateDer::from_pem_file(home.dir().join("roots.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf, root], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let record = heard.clone();
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(mut tls) = acceptor.accept(stream).await else { continue };
            // An empty SETTINGS frame and its acknowledgement: enough of HTTP/2 that a request comes.
            let _ = tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0]).await;
            let mut buffer = [0; 4096];
            while let Ok(Ok(count @ 1..)) = timeout(Duration::from_secs(1), tls.read(&mut buffer)).await {
                record.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        }
    });
    (address, heard, task)
}

#[tokio::test]
async fn a_token_is_sent_only_to_an_authority_that_has_proven_itself() {
    let home = Home::new();
    let token = home.token(WEB, &[]);
    let secret = fs::read_to_string(&token).unwrap();

    // Its certificate shows the right root, and another key signed it.
    let other_key = KeyPair::generate().unwrap();
    let mut other = CertificateParams::default();
    other.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let (at, heard, task) = recorder(&home, &Issuer::new(other, other_key)).await;
    let mut web = Workload::start(home.settings(at, &token));
    let error = web.error().await;
    assert!(error.contains("has not proven itself"), "{error}");
    sleep(Duration::from_millis(1500)).await;
    assert!(heard.lock().unwrap().is_empty(), "something was sent: {:?}", heard.lock().unwrap());
    assert!(web.status.borrow().failures > 1, "it goes on trying");
    task.abort();

    // The control: signed by the pinned root, the same server hears the token.
    let (at, heard, task) = recorder(&home, &root_of(&home)).await;
    let _web = Workload::start(home.settings(at, &token));
    let began = Instant::now();
    while !String::from_utf8_lossy(&heard.lock().unwrap()).contains(&secret) {
        assert!(began.elapsed() < SOON, "the control heard no token: {:?}", heard.lock().unwrap());
        sleep(Duration::from_millis(50)).await;
    }
    task.abort();
}

#[tokio::test]
async fn an_authority_of_another_root_is_not_asked() {
    let (home, other) = (Home::new(), Home::new());
    let serving = Serving::start(&other, &[]).await;
    let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
    let error = web.error().await;
    assert!(error.contains("has not proven itself"), "{error}");
    assert!(other.audit().is_empty(), "it was asked: {:?}", other.audit());
}

#[tokio::test]
async fn ten_second_certificates_are_renewed_in_time_and_outlast_an_absence() {
    let home = Home::new();
    let serving = Serving::start(&home, &["--lifetime", "10s"]).await;
    let listen = serving.listen;
    let token = home.token(WEB, &[]);
    let mut web = Workload::start(home.settings(listen, &token));
    let first = web.identified().await;
    let second = web.wait(Duration::from_secs(8), |held| held.serial() != first.serial()).await;
    assert!(first.remaining(SystemTime::now()) > Duration::from_secs(2), "renewed late");
    assert_eq!(home.audit()[1]["proof"], "certificate");

    // Away for a renewal: what is valid stays, and a new one comes when the authority is back.
    drop(serving);
    timeout(SOON, web.status.wait_for(|status| status.failures > 1)).await.expect("no failure").unwrap();
    assert_eq!(web.credentials.borrow().as_ref().unwrap().serial(), second.serial());
    let serving = Serving::start_at(&home, listen, &["--lifetime", "10s"]).await;
    let third = web.wait(Duration::from_secs(5), |held| held.serial() != second.serial()).await;
    assert!(second.remaining(SystemTime::now()) > Duration::ZERO, "there was a gap");

    // Away for longer than a life: nothing expired stays published.
    drop(serving);
    timeout(Duration::from_secs(12), web.credentials.wait_for(Option::is_none)).await.expect("kept").unwrap();
    assert!(third.remaining(SystemTime::now()).is_zero());

    // Back, with the token used up: refused, until an operator puts another one there.
    let _serving = Serving::start_at(&home, listen, &["--lifetime", "10s"]).await;
    let refused = |status: &Status| status.last_error.as_ref().is_some_and(|text| text.contains("Unauth"));
    timeout(Duration::from_secs(25), web.status.wait_for(refused)).await.expect("no refusal").unwrap();
    fs::rename(home.token(WEB, &[]), &token).unwrap();
    web.wait(Duration::from_secs(25), |_| true).await;
}

#[tokio::test]
async fn added_roots_reach_the_workloads_and_bad_ones_do_not() {
    let (home, other) = (Home::new(), Home::new());
    let serving = Serving::start(&home, &[]).await;
    let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
    let before = web.identified().await;
    assert_eq!(before.bundle().roots().len(), 1);
    let write = |text: String| {
        let aside = home.path("new-roots");
        fs::write(&aside, text).unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&aside, home.dir().join("roots.pem")).unwrap();
    };
    let own = fs::read_to_string(home.dir().join("roots.pem")).unwrap();
    let foreign = fs::read_to_string(other.dir().join("roots.pem")).unwrap();
    write(format!("{own}{foreign}"));
    let after = web.wait(SOON, |held| held.bundle().roots().len() == 2).await;
    assert_eq!(after.serial(), before.serial(), "the certificate is the same");

    write(foreign);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(web.credentials.borrow().as_ref().unwrap().bundle().roots().len(), 2);
    assert!(serving.get("/metrics").await.contains(r#"weft_ca_upkeep_failures_total{subject="state"}"#));
    assert!(fs::read_to_string(home.path("log")).unwrap().contains("lacks the root"));
    write(own);
    web.wait(SOON, |held| held.bundle().roots().len() == 1).await;
}

#[tokio::test]
async fn a_kept_certificate_outlives_a_restart_and_a_new_token_wins_over_it() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let state = home.path("state");
    fs::create_dir(&state).unwrap();
    let token = home.token(WEB, &[]);
    let settings = Settings { state_dir: Some(state), ..home.settings(serving.listen, &token) };
    let serial = Workload::start(settings.clone()).identified().await.serial().to_owned();
    // The same again, though the token is used up, and even without the authority.
    let mut again = Workload::start(settings.clone());
    assert_eq!(again.identified().await.serial(), serial);
    let away = Settings { address: "127.0.0.1:1".to_owned(), ..settings.clone() };
    assert_eq!(Workload::start(away).identified().await.serial(), serial);
    assert_eq!(home.audit().len(), 1);
    drop(again);

    fs::rename(home.token(ORDERS, &[]), &token).unwrap();
    let mut changed = Workload::start(settings);
    changed.wait(SOON, |held| held.id().as_str() == ORDERS).await;
}

#[tokio::test]
async fn a_new_authority_with_a_new_pin_and_token_takes_over() {
    let (home, successor) = (Home::new(), Home::new());
    let serving = Serving::start(&home, &["--lifetime", "10s"]).await;
    let listen = serving.listen;
    let token = home.token(WEB, &[]);
    let settings = home.settings(listen, &token);
    let Pin::File(pin) = settings.pin.clone() else { unreachable!() };
    let mut web = Workload::start(settings);
    let before = web.identified().await;
    drop(serving);
    fs::copy(successor.dir().join("roots.pem"), &pin).unwrap();
    fs::rename(successor.token(WEB, &[]), &token).unwrap();
    let _serving = Serving::start_at(&successor, listen, &[]).await;
    // Our certificate is refused in the handshake; the token does it, before the old certificate ends.
    let root = CertificateDer::from_pem_file(successor.dir().join("roots.pem")).unwrap();
    let after = web.wait(Duration::from_secs(9), |held| held.serial() != before.serial()).await;
    assert_eq!(after.bundle().roots(), [root]);
    assert_eq!(successor.audit()[0]["proof"], "token");
}

#[tokio::test]
async fn a_client_that_never_speaks_gives_way_and_is_sent_away() {
    let home = Home::new();
    let serving = Serving::start(&home, &["--max-connections", "1"]).await;
    let mut first = TcpStream::connect(serving.listen).await.unwrap();
    // Wait until it counts, then the next one takes its place.
    let began = Instant::now();
    while !serving.get("/metrics").await.contains("weft_ca_connections 1") {
        assert!(began.elapsed() < SOON);
        sleep(Duration::from_millis(20)).await;
    }
    let mut second = TcpStream::connect(serving.listen).await.unwrap();
    assert_eq!(timeout(SOON, first.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
    let end = timeout(Duration::from_secs(8), second.read(&mut [0; 1])).await.expect("still connected");
    assert_eq!(end.unwrap_or(0), 0);
    let metrics = serving.get("/metrics").await;
    assert!(metrics.contains(r#"weft_ca_dropped_total{reason="timeout"} 1"#), "{metrics}");
    assert!(metrics.contains(r#"weft_ca_dropped_total{reason="displaced"} 1"#), "{metrics}");

    // A stream of the bundle has a request in flight: it does not give way.
    let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
    web.identified().await;
    let began = Instant::now();
    while !serving.get("/metrics").await.contains("weft_ca_watchers 1") {
        assert!(began.elapsed() < SOON);
        sleep(Duration::from_millis(20)).await;
    }
    let mut third = TcpStream::connect(serving.listen).await.unwrap();
    assert_eq!(timeout(SOON, third.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
    let metrics = serving.get("/metrics").await;
    assert!(metrics.contains(r#"weft_ca_dropped_total{reason="too_many"} 1"#), "{metrics}");
}

#[tokio::test]
async fn a_log_that_cannot_be_written_stops_nothing() {
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    let closed = || Stdio::from(std::io::pipe().unwrap().1);
    for errors in [full(), closed()] {
        let (home, other) = (Home::new(), Home::new());
        let serving = Serving::start_after(&home, ":", errors, &["--lifetime", "10s"]).await;
        // Lines of the accept loop's tasks and of the upkeep.
        let mut stranger = TcpStream::connect(serving.listen).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _ = timeout(SOON, stranger.read_to_end(&mut Vec::new())).await.unwrap();
        let roots = home.dir().join("roots.pem");
        let (own, foreign) =
            (fs::read_to_string(&roots).unwrap(), fs::read_to_string(other.dir().join("roots.pem")).unwrap());
        let settings = home.settings(serving.listen, &home.token(WEB, &[]));
        fs::write(&roots, &foreign).unwrap();
        let began = Instant::now();
        while !serving.get("/metrics").await.contains("weft_ca_upkeep_failures_total{") {
            assert!(began.elapsed() < SOON, "the upkeep has ended");
            sleep(Duration::from_millis(50)).await;
        }
        fs::write(&roots, format!("{own}{foreign}")).unwrap();
        let mut web = Workload::start(settings);
        let first = web.wait(SOON, |held| held.bundle().roots().len() == 2).await;
        web.wait(SOON, |held| held.serial() != first.serial()).await;
        assert!(serving.get("/ready").await.starts_with("HTTP/1.1 200"));
        assert_eq!(serving.terminate().await, Some(0));
    }
    // A command whose complaint nobody hears still says by its exit code that it was refused.
    let refused =
        Command::new(program("weft-ca")).args(["root", "--dir", "/nowhere"]).stderr(full()).status().unwrap();
    assert_eq!(refused.code(), Some(2));
    let home = Home::new();
    let unheard = Command::new(program("weft-ca"))
        .args(["root", "--sha256", "--dir"])
        .arg(home.dir())
        .stdout(full())
        .output()
        .unwrap();
    assert_eq!(unheard.status.code(), Some(2), "{}", error_of(&unheard));
    assert!(error_of(&unheard).contains("standard output"), "{}", error_of(&unheard));
}

/// A log collector that is stuck: the pipe stays open, and nobody reads it.
#[tokio::test]
async fn a_log_that_nobody_reads_stops_nothing() {
    let home = Home::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let serving = Serving::start_after(&home, "export WEFT_CA_LOG=trace", writer.into(), &[]).await;
    let token = home.token(WEB, &["--reusable"]);
    let lost = async || {
        let metrics = timeout(SOON, serving.get("/metrics")).await.expect("the probes hang");
        let mut lines = metrics.lines();
        let count = lines.find_map(|line| line.strip_prefix("weft_ca_log_lines_dropped_total "));
        count.and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{metrics}"))
    };
    let fill = async || {
        let (before, began) = (lost().await, Instant::now());
        while lost().await == before {
            let given = timeout(SOON, issue(&home, serving.listen, None, request(&token))).await;
            given.expect("it is deaf").unwrap();
            assert!(began.elapsed() < 6 * SOON, "no line was lost");
        }
    };
    fill().await;
    let ready = timeout(SOON, serving.get("/ready")).await.expect("the probes hang");
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    // Somebody reads again for a while.
    let copy = reader.try_clone().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(copy)).map_while(Result::ok);
        lines.any(|line| line.contains("lines of this log were lost since the start"))
    });
    assert!(timeout(SOON, reading).await.expect("it is not said").unwrap());
    fill().await;
    assert_eq!(serving.terminate().await, Some(0));
    drop(reader);
}

#[tokio::test]
async fn each_signal_drains_rereads_or_means_nothing() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let home = Home::new();
        let serving = Serving::start(&home, &[]).await;
        let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
        web.identified().await;
        assert_eq!(serving.end_by(signal).await, Some(0), "{signal}");
        let log = fs::read_to_string(home.path("log")).unwrap();
        assert!(log.contains("stopping") && log.contains(signal.as_str()), "{signal}: {log}");
        assert!(!log.contains("cut after"), "{signal}: the stream of the bundle was not told: {log}");
    }
    let home = Home::new();
    let mut serving = Serving::start(&home, &[]).await;
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH, Signal::SIGHUP, Signal::SIGPIPE] {
        serving.signal(signal);
        sleep(Duration::from_millis(300)).await;
        assert!(serving.process.try_wait().unwrap().is_none(), "{signal} ended it");
        assert!(serving.get("/ready").await.starts_with("HTTP/1.1 200"), "{signal}");
    }
    // HUP after a rotation: the next line is in the new file.
    let token = home.token(WEB, &["--reusable"]);
    issue(&home, serving.listen, None, request(&token)).await.unwrap();
    fs::rename(home.path("audit"), home.path("audit.1")).unwrap();
    serving.signal(Signal::SIGHUP);
    let began = Instant::now();
    while !home.path("audit").exists() {
        assert!(began.elapsed() < SOON, "the audit was not opened again");
        sleep(Duration::from_millis(20)).await;
    }
    issue(&home, serving.listen, None, request(&token)).await.unwrap();
    assert_eq!(home.audit().len(), 1);
}

/// An issuing certificate as a clock leaves it that was ahead for a moment.
fn future_issuing(home: &Home) -> String {
    let day = Duration::from_secs(24 * 3600);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Weft issuing of the future");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (SystemTime::now() + 50 * day).into();
    params.not_after = (SystemTime::now() + 140 * day).into();
    let certificate = params.signed_by(&key, &root_of(home)).unwrap();
    format!("{}{}", certificate.pem(), key.serialize_pem())
}

#[tokio::test]
async fn an_issuing_certificate_that_is_bad_missing_or_of_the_future_is_signed_anew() {
    let missing = |home: &Home| drop(fs::remove_file(home.dir().join("issuing.pem")));
    let damaged = |home: &Home| fs::write(home.dir().join("issuing.pem"), "not PEM").unwrap();
    let future = |home: &Home| fs::write(home.dir().join("issuing.pem"), future_issuing(home)).unwrap();
    for spoil in [&missing as &dyn Fn(&Home), &damaged, &future] {
        let home = Home::new();
        spoil(&home);
        let serving = Serving::start(&home, &[]).await;
        assert!(serving.get("/ready").await.starts_with("HTTP/1.1 200"));
        Workload::start(home.settings(serving.listen, &home.token(WEB, &[]))).identified().await;
        let log = fs::read_to_string(home.path("log")).unwrap();
        assert!(log.contains("issuing.pem cannot be used"), "{log}");
    }
}

/// A TLS connection to the authority, without a certificate and without a word.
async fn wordless(home: &Home, at: SocketAddr) -> Option<weft_sidecar::net::Stream> {
    let root = CertificateDer::from_pem_file(home.dir().join("roots.pem")).unwrap();
    let tcp = TcpStream::connect(at).await.unwrap();
    let proven =
        connect_authority(tcp.into(), vec![Anchor::Roots(vec![root])], None, KeyExchange::default()).await;
    proven.ok().map(|(stream, _)| stream)
}

#[tokio::test]
async fn idle_connections_of_strangers_make_it_deaf_to_nobody() {
    let home = Home::new();
    let log = || fs::File::options().create(true).append(true).open(home.path("log")).unwrap().into();
    let limits = "ulimit -Sn 128 && ulimit -Hn 400";
    let serving = Serving::start_after(&home, limits, log(), &[]).await;
    let text = fs::read_to_string(home.path("log")).unwrap();
    assert!(text.contains("--max-connections is 10000, and 400 descriptors are enough for 208"), "{text}");
    let began = Instant::now();
    let mut idle = Vec::new();
    for _ in 0..500 {
        idle.extend(wordless(&home, serving.listen).await);
    }
    assert!(idle.len() > 208, "only {} connections stood at all", idle.len());
    let live = timeout(SOON, serving.get("/live")).await.expect("no answer of /live");
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    let issued = timeout(SOON, issue(&home, serving.listen, None, request(&home.token(WEB, &[])))).await;
    issued.expect("it is deaf").unwrap();
    // The youngest was not displaced; it has not asked in time.
    let mut youngest = idle.pop().unwrap();
    let end = timeout(Duration::from_secs(20), youngest.read(&mut [0; 64])).await;
    while let Ok(Ok(1..)) = timeout(Duration::from_secs(20), youngest.read(&mut [0; 64])).await {}
    assert!(end.is_ok(), "a connection that never asks still stands after {:?}", began.elapsed());
    let metrics = serving.get("/metrics").await;
    assert!(metrics.contains(r#"weft_ca_dropped_total{reason="displaced"}"#), "{metrics}");
    assert!(metrics.contains(r#"weft_ca_dropped_total{reason="timeout"}"#), "{metrics}");
}

#[tokio::test]
async fn streams_of_strangers_leave_places_for_workloads() {
    let home = Home::new();
    let serving = Serving::start(&home, &["--max-connections", "8"]).await;
    let mut held = Vec::new();
    let refused = loop {
        let mut stranger = client(&home, serving.listen, None).await;
        match stranger.watch_bundle(WatchBundleRequest {}).await {
            Ok(stream) => held.push((stranger, stream)),
            Err(status) => break status,
        }
        assert!(held.len() <= 8, "strangers take every place");
    };
    assert_eq!((refused.code(), held.len()), (Code::ResourceExhausted, 2), "{refused}");
    let mut web = Workload::start(home.settings(serving.listen, &home.token(WEB, &[])));
    web.identified().await;
    let began = Instant::now();
    while !serving.get("/metrics").await.contains("weft_ca_watchers 3") {
        assert!(began.elapsed() < SOON, "a workload with its certificate gets no stream");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn half_requests_at_the_probes_keep_no_probe_waiting() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let mut halves = Vec::new();
    for _ in 0..200 {
        let mut half = TcpStream::connect(serving.admin).await.unwrap();
        half.write_all(b"GET /live HTTP/1.1\r\nHost: ").await.unwrap();
        halves.push(half);
    }
    // Less than the time that the head of a request may take, and far more than an answer does.
    for path in ["/live", "/ready", "/metrics"] {
        let answer = timeout(Duration::from_secs(4), serving.get(path)).await;
        assert!(answer.expect("no answer").starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn a_flood_of_refusals_fills_no_audit() {
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let token = home.token(WEB, &[]);
    for _ in 0..100 {
        let unproven = IssueRequest { join_token: String::new(), ..request(&token) };
        assert!(issue(&home, serving.listen, None, unproven).await.is_err());
    }
    issue(&home, serving.listen, None, request(&token)).await.unwrap();
    let audit = home.audit();
    let refused = audit.iter().filter(|line| line["event"] == "refused").count();
    assert!((1..=40).contains(&refused), "{refused} lines of refusals");
    assert_eq!(audit.last().unwrap()["event"], "issued");
    let metrics = serving.get("/metrics").await;
    assert!(metrics.contains(r#"weft_ca_refused_total{reason="no_proof"} 100"#), "{metrics}");
}

#[tokio::test]
async fn while_the_audit_cannot_be_written_nothing_is_given_and_no_token_is_lost() {
    let home = Home::new();
    // Files end at 1 KiB: what a full disk does to them, half a line included.
    let limits = "trap '' XFSZ; ulimit -f 2";
    let serving = Serving::start_after(&home, limits, Stdio::null(), &[]).await;
    let (many, once) = (home.token(WEB, &["--reusable"]), home.token(ORDERS, &[]));
    let mut given = 0;
    let refused = loop {
        match issue(&home, serving.listen, None, request(&many)).await {
            Ok(_) => given += 1,
            Err(status) => break status,
        }
        assert!(given < 9, "the audit has no end");
    };
    assert_eq!((refused.code(), given > 0), (Code::Internal, true), "{refused}");
    let ready = serving.get("/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("audit"), "{ready}");
    assert!(issue(&home, serving.listen, None, request(&once)).await.is_err());

    fs::rename(home.path("audit"), home.path("audit.full")).unwrap();
    serving.signal(Signal::SIGHUP);
    let began = Instant::now();
    while !serving.get("/ready").await.starts_with("HTTP/1.1 200") {
        assert!(began.elapsed() < SOON, "it does not go on");
        sleep(Duration::from_millis(20)).await;
    }
    issue(&home, serving.listen, None, request(&once)).await.expect("the token was lost");
    assert_eq!(home.audit().last().unwrap()["event"], "issued");
}

#[tokio::test]
async fn a_reader_of_the_audit_who_stalls_stops_neither_probes_nor_signals() {
    let home = Home::new();
    let audit = home.path("audit");
    let made = Command::new("mkfifo").args(["-m", "600"]).arg(&audit).status().unwrap();
    assert!(made.success());
    let serving = Serving::start(&home, &[]).await;
    let mut pipe = fs::File::options()
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(&audit)
        .unwrap();
    while matches!(std::io::Write::write(&mut pipe, &[b'\n'; 4096]), Ok(1..)) {}
    let token = home.token(WEB, &["--reusable"]);
    let mut before = client(&home, serving.listen, None).await;
    let asked = request(&token);
    let waiting = tokio::spawn(async move { before.issue(asked).await });
    let began = Instant::now();
    loop {
        let ready = timeout(SOON, serving.get("/ready")).await.expect("the probes hang");
        if ready.starts_with("HTTP/1.1 503") && ready.contains("audit") {
            break;
        }
        assert!(began.elapsed() < SOON, "it looks ready");
        sleep(Duration::from_millis(100)).await;
    }
    let live = timeout(SOON, serving.get("/live")).await.expect("the probes hang");
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    let refused = timeout(SOON, issue(&home, serving.listen, None, request(&token))).await;
    assert_eq!(refused.expect("it is deaf").unwrap_err().code(), Code::Internal);
    serving.signal(Signal::SIGHUP);
    assert_eq!(serving.terminate().await, Some(0));
    assert!(waiting.await.unwrap().is_err(), "a certificate that was not written down was given");
    let log = fs::read_to_string(home.path("log")).unwrap();
    assert!(log.contains("the audit is not taken"), "{log}");
}

#[test]
fn no_connections_at_all_are_refused_as_a_setting() {
    let refused = Home::new().command(&["serve", "--max-connections", "0"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(error_of(&refused).contains("--max-connections"), "{}", error_of(&refused));
}

#[tokio::test]
async fn py_spiffe_and_openssl_take_our_certificates() {
    if !can_run(&[Need::Python, Need::Program("openssl", "openssl")]) {
        return;
    }
    let home = Home::new();
    let serving = Serving::start(&home, &[]).await;
    let key = KeyPair::generate().unwrap();
    let asked = request_for(&key, &home.token(WEB, &[]));
    let answer = issue(&home, serving.listen, None, asked).await.unwrap();
    for (at, name) in [(0, "leaf"), (1, "issuing")] {
        fs::write(home.path(&format!("{name}.der")), &answer.chain[at]).unwrap();
        let made = Command::new("openssl")
            .args(["x509", "-inform", "DER", "-in"])
            .arg(home.path(&format!("{name}.der")))
            .arg("-out")
            .arg(home.path(&format!("{name}.pem")))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", error_of(&made));
    }
    let verified = Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"])
        .arg(home.dir().join("roots.pem"))
        .arg("-untrusted")
        .arg(home.path("issuing.pem"))
        .arg(home.path("leaf.pem"))
        .output()
        .unwrap();
    assert!(verified.status.success(), "{}", error_of(&verified));
    fs::write(home.path("key.pem"), key.serialize_pem()).unwrap();
    const READ: &str = "import sys; from spiffe import X509Svid\n\
        read = lambda name: open(name, 'rb').read()\n\
        leaf, issuing, key = map(read, sys.argv[1:])\n\
        print(X509Svid.parse(leaf + issuing, key).spiffe_id)";
    let read = Command::new(python())
        .args(["-c", READ])
        .args(["leaf.pem", "issuing.pem", "key.pem"].map(|name| home.path(name)))
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", error_of(&read));
    assert_eq!(String::from_utf8_lossy(&read.stdout).trim(), WEB);
}
