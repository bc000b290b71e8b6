//! Small partners for the tests of the redirect: servers that tell where a connection was going, clients, and a
//! stand-in for the sidecar outside a namespace of `exec`. What it prints the tests read.

use std::{
    env,
    ffi::OsString,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::ExitStatusExt,
    process::ExitCode,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use tokio::io::AsyncReadExt;
use weft_sidecar::{
    net::original_destination,
    redirect::{Backend, Namespace, NamespaceSettings},
};

const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().filter_map(|argument| argument.to_str()).collect();
    let done = match words.as_slice() {
        // the same program is the helper too
        [weft_sidecar::redirect::NAMESPACE_ARGUMENT, ..] => return weft_sidecar::redirect::namespace_main(),
        ["serve", addresses @ ..] => serve(addresses),
        ["answer", addresses @ ..] => answer(addresses),
        ["dial", address] => dial(address),
        ["ask", from, to, text] => ask(from, to, text),
        ["outside", ..] => return outside(&arguments[1..]),
        other => Err(io::Error::other(format!("{other:?}?"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Tells each TCP client the port it arrived at, and its original destination.
fn serve(addresses: &[&str]) -> io::Result<()> {
    let mut servers = Vec::new();
    for address in addresses {
        let listener: TcpListener = bound(address, Type::STREAM)?.into();
        servers.push(thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = writeln!(&stream, "{}", arrival(&stream));
            }
        }));
    }
    println!("serving");
    servers.into_iter().for_each(|server| drop(server.join()));
    Ok(())
}

/// IPv6 apart from IPv4, as the sidecar has them.
fn bound(address: &str, kind: Type) -> io::Result<Socket> {
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(kind == Type::STREAM)?;
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(128)?;
    }
    Ok(socket)
}

fn arrival(stream: &TcpStream) -> String {
    let Ok(local) = stream.local_addr() else { return "gone".to_owned() };
    match original_destination(stream, local.is_ipv6()) {
        Ok(original) => format!("{} {original}", local.port()),
        // without rules nothing is tracked, and nothing redirected
        Err(error) if error.kind() == io::ErrorKind::NotFound => format!("{} {local}", local.port()),
        Err(error) => format!("{} {error}", local.port()),
    }
}

/// Answers each UDP question with the port it arrived at, and itself.
fn answer(addresses: &[&str]) -> io::Result<()> {
    let mut servers = Vec::new();
    for address in addresses {
        let socket: UdpSocket = bound(address, Type::DGRAM)?.into();
        servers.push(thread::spawn(move || answer_all(&socket)));
    }
    println!("serving");
    servers.into_iter().for_each(|server| drop(server.join()));
    Ok(())
}

fn answer_all(socket: &UdpSocket) -> io::Result<()> {
    let port = socket.local_addr()?.port();
    let mut question = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut question)?;
        let text = String::from_utf8_lossy(&question[..length]);
        socket.send_to(format!("{port} {text}").as_bytes(), from)?;
    }
}

fn dial(address: &str) -> io::Result<()> {
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    print!("{said}");
    Ok(())
}

fn ask(from: &str, to: &str, text: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(from)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(text.as_bytes())?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    println!("{}", String::from_utf8_lossy(&answer[..length]));
    Ok(())
}

/// Runs a command as `weft-sidecar exec` does, and answers what it sends out. Words before `--`: `upstream=ADDRESS`
/// listens there inside; `app=ADDRESS` dials the app there; `program=PATH` is the helper; `backend=nft` or `legacy`.
fn outside(arguments: &[OsString]) -> ExitCode {
    let at = arguments.iter().position(|word| word == "--").expect("a command after --");
    let (options, command) = (&arguments[..at], &arguments[at + 1..]);
    let mut settings = NamespaceSettings { workers: 2, ..NamespaceSettings::default() };
    let mut apps = Vec::new();
    for option in options {
        match option.to_str().and_then(|option| option.split_once('=')).expect("name=value") {
            ("upstream", address) => settings.upstreams.push(address.parse().expect("an address")),
            ("app", address) => apps.push(address.parse().expect("an address")),
            ("program", path) => settings.program = path.into(),
            ("backend", "legacy") => settings.backend = Backend::Legacy,
            ("backend", "nft") => settings.backend = Backend::Nft,
            other => panic!("{other:?}?"),
        }
    }
    let (namespace, listeners) = match Namespace::start(command, &settings) {
        Ok(started) => started,
        Err(error) => {
            println!("refused: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!("outbound listeners: {}", listeners.outbound.len());
    let upstreams = listeners.upstreams.into_iter().map(|(_, listener)| listener);
    for listener in listeners.outbound.into_iter().chain(listeners.dns_tcp).chain(upstreams) {
        listener.set_nonblocking(false).expect("a listener");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                println!("outside saw {}", arrival(&stream));
                let _ = writeln!(&stream, "{}", arrival(&stream));
            }
        });
    }
    for socket in listeners.dns_udp {
        socket.set_nonblocking(false).expect("a socket");
        thread::spawn(move || answer_all(&socket));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(run(&namespace, apps))
}

async fn run(namespace: &Namespace, apps: Vec<SocketAddr>) -> ExitCode {
    let mut terminate =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a signal");
    if let Err(error) = namespace.start_command().await {
        println!("not started: {error}");
        return ExitCode::from(127);
    }
    println!("started");
    for address in apps {
        println!(
            "app said: {}",
            dial_app(namespace, address).await.unwrap_or_else(|error| error.to_string())
        );
    }
    let status = loop {
        tokio::select! {
            status = namespace.wait() => break status,
            _ = terminate.recv() => namespace.signal(Signal::SIGTERM),
        }
    };
    match status {
        Ok(status) => {
            println!("ended: code {:?} signal {:?}", status.code(), status.signal());
            ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(200))
        }
        Err(error) => {
            println!("lost: {error}");
            ExitCode::from(201)
        }
    }
}

/// Many connections at once, as from several workers; all must say the same.
async fn dial_app(namespace: &Namespace, address: SocketAddr) -> io::Result<String> {
    let one = || async {
        let socket = namespace.app_socket(address.is_ipv6()).await?;
        let mut stream = socket.connect(address).await?;
        let mut said = String::new();
        stream.read_to_string(&mut said).await?;
        Ok::<_, io::Error>(said.trim().to_owned())
    };
    let mut first = one().await;
    for _ in 0..200 {
        if first.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        first = one().await;
    }
    let first = first?;
    for _ in 0..100 {
        let (left, right) = tokio::join!(one(), one());
        if left? != first || right? != first {
            return Err(io::Error::other("the app said different things"));
        }
    }
    Ok(first)
}
