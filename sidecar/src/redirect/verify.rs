//! Proves a redirect with real connections. Runs in the init step, before the sidecar: it takes the sidecar's
//! ports for a moment, connects as a user that is not the sidecar's to an address that nobody has (TEST-NET-1,
//! RFC 5737; 2001:db8::/32, RFC 3849), and looks where the connection arrives and what its original destination is.
//! Connections from other hosts cannot be made from here: for them it looks at the rules only, and says so.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use anyhow::Result;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Uid, geteuid, setfsuid},
};

use crate::net::original_destination;

use super::{
    finding::Finding,
    iptables::{Backend, Tools},
    plan::{Plan, plan},
    rules::{Family, Rules},
    settings::{DNS, Settings},
};

/// How long an experiment may take; a redirected connection is there at once.
const PATIENCE: Duration = Duration::from_secs(2);
/// A port that nothing else would use (TCP port service multiplexer, RFC 1078).
const SOME_PORT: u16 = 1;
const SOME_QUESTION: &[u8] = b"weft-verify";

/// Looks at the rules and tries them. The redirect stands if no finding is `Wrong`.
///
/// # Errors
/// If the settings cannot be planned, or no iptables works.
pub fn verify(settings: &Settings, backend: Backend) -> Result<Vec<Finding>> {
    let plan = plan(settings)?;
    let tools = Tools::choose(backend)?;
    let mut findings = rules_are_there(&plan, &tools);
    for family in [Family::Ipv4, Family::Ipv6].into_iter().take(if settings.ipv6 { 2 } else { 1 }) {
        match other_user(settings) {
            Ok(uid) => {
                findings.push(outbound_arrives(settings, family, uid));
                if settings.dns {
                    findings.push(dns_arrives(settings, family, uid));
                }
            }
            Err(finding) => findings.push(finding),
        }
    }
    findings.push(Finding::unknown(
        "connections from other hosts",
        format!("only the rules were looked at; they go to port {}", settings.inbound_port),
    ));
    Ok(findings)
}

fn rules_are_there(plan: &Plan, tools: &Tools) -> Vec<Finding> {
    let wanted = [(Family::Ipv4, Some(&plan.ipv4)), (Family::Ipv6, plan.ipv6.as_ref())];
    wanted
        .into_iter()
        .filter_map(|(family, rules)| Some((family, rules?)))
        .map(|(family, rules)| {
            let subject = format!("{} rules (iptables-{})", family.label(), tools.backend.label());
            let missing = match tools.present(family) {
                Ok(present) => what_is_missing(rules, &present),
                Err(error) => vec![format!("{error:#}")],
            };
            if missing.is_empty() {
                Finding::shown(subject, "present as planned")
            } else {
                let advice = "run `weft-sidecar redirect apply` with the same settings";
                Finding::wrong(subject, format!("{}; {advice}", missing.join("; ")))
            }
        })
        .collect()
}

/// By number of rules, as iptables prints a rule in other words than it was given.
fn what_is_missing(wanted: &Rules, present: &Rules) -> Vec<String> {
    let mut missing = Vec::new();
    for table in &wanted.tables {
        let there = present.table(&table.name);
        for chain in &table.chains {
            let count = chain.rules.len();
            match there.and_then(|there| there.chain(&chain.name)).map(|found| found.rules.len()) {
                None => missing.push(format!("table {}: chain {} is missing", table.name, chain.name)),
                Some(found) if found != count => missing.push(format!(
                    "table {}: chain {} has {found} rules, expected {count}",
                    table.name, chain.name
                )),
                Some(_) => {}
            }
        }
        let found = there.map_or(0, |there| there.jumps.len());
        if found != table.jumps.len() {
            missing.push(format!(
                "table {}: {found} rules lead to chains of Weft, expected {}",
                table.name,
                table.jumps.len()
            ));
        }
    }
    missing
}

/// A user whose connections are redirected: the current one, else, as root, any other.
fn other_user(settings: &Settings) -> Result<Uid, Finding> {
    let redirected = |uid: &u32| *uid != settings.sidecar_uid && !settings.exclude_uids.contains(uid);
    let current = geteuid().as_raw();
    if redirected(&current) {
        return Ok(Uid::from_raw(current));
    }
    if current == 0
        && let Some(uid) = (60_000..65_535).rev().find(redirected)
    {
        return Ok(Uid::from_raw(uid));
    }
    Err(Finding::unknown(
        "connections of the app",
        format!("only the rules were looked at: user {current} is not redirected, and cannot act as another"),
    ))
}

fn outbound_arrives(settings: &Settings, family: Family, uid: Uid) -> Finding {
    let subject = format!("{} connections of the app", family.label());
    let Some(target) = target(settings, family) else {
        return Finding::unknown(subject, "the settings include no network of this family");
    };
    let port = settings.outbound_port;
    let listener = match TcpListener::bind((loopback(family), port)) {
        Ok(listener) => listener,
        Err(error) => return port_not_free(subject, port, &error),
    };
    let seen = thread::scope(|scope| {
        let client = scope.spawn(|| as_user(uid, || TcpStream::connect_timeout(&target, PATIENCE)));
        let seen = if is_readable(&listener) {
            listener.accept().and_then(|(stream, _)| original_destination(&stream, family == Family::Ipv6))
        } else {
            Err(io::ErrorKind::TimedOut.into())
        };
        let client = client.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        seen.map_err(|error| client.err().unwrap_or(error))
    });
    match seen {
        Ok(original) if original == target => {
            Finding::shown(subject, format!("one to {target} arrived at port {port} with that destination"))
        }
        Ok(original) => Finding::wrong(
            subject,
            format!("one to {target} arrived at port {port} with the destination {original}"),
        ),
        Err(error) if has_no_route(&error) => {
            Finding::unknown(subject, format!("no route to {target}, so none leaves unredirected either"))
        }
        Err(error) => Finding::wrong(
            subject,
            format!(
                "one to {target} did not arrive at port {port} ({error}); run `weft-sidecar redirect apply`"
            ),
        ),
    }
}

fn dns_arrives(settings: &Settings, family: Family, uid: Uid) -> Finding {
    let subject = format!("{} DNS of the app", family.label());
    let port = settings.dns_port;
    let server = match UdpSocket::bind((loopback(family), port)) {
        Ok(server) => server,
        Err(error) => return port_not_free(subject, port, &error),
    };
    let target = SocketAddr::new(nobody(family), DNS);
    match asked_and_answered(&server, target, uid) {
        Ok(()) => Finding::shown(subject, format!("a question to {target} was answered from port {port}")),
        Err(error) if has_no_route(&error) => {
            Finding::unknown(subject, format!("no route to {target}, so none leaves unredirected either"))
        }
        Err(error) => Finding::wrong(
            subject,
            format!("a question to {target} got no answer from port {port} ({error})"),
        ),
    }
}

/// One question as that user, and the answer of our own server back to it.
fn asked_and_answered(server: &UdpSocket, target: SocketAddr, uid: Uid) -> io::Result<()> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    thread::scope(|scope| {
        let client = scope.spawn(move || {
            let socket = as_user(uid, || UdpSocket::bind((any, 0)))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(target)?;
            socket.send(SOME_QUESTION)?;
            let mut answer = [0; SOME_QUESTION.len()];
            socket.recv(&mut answer).map(drop)
        });
        if is_readable(server) {
            let mut question = [0; SOME_QUESTION.len()];
            let (length, from) = server.recv_from(&mut question)?;
            server.send_to(&question[..length], from)?;
        }
        client.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

/// Makes a socket in the name of a user. netfilter's owner is the file system user of the thread that made it,
/// and that is changed for this thread only.
fn as_user<T>(uid: Uid, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = setfsuid(uid);
    // it reports no error but the user before; asking again tells
    let now = setfsuid(uid);
    let made = if now == uid { make() } else { Err(Errno::EPERM.into()) };
    setfsuid(own);
    made
}

fn target(settings: &Settings, family: Family) -> Option<SocketAddr> {
    let included = &settings.include_outbound_networks;
    let of_family = |address: &IpAddr| address.is_ipv4() == (family == Family::Ipv4);
    let address = if included.is_empty() {
        nobody(family)
    } else {
        included.iter().map(|network| network.some_address()).find(of_family)?
    };
    let excluded = |port: &u16| {
        settings.exclude_outbound_ports.iter().any(|range| range.contains(*port))
            || *port == DNS
            || *port == settings.admin_port
    };
    let included = &settings.include_outbound_ports;
    let port = if included.is_empty() {
        (SOME_PORT..).find(|port| !excluded(port))?
    } else {
        included.iter().map(|range| range.first()).find(|port| !excluded(port))?
    };
    Some(SocketAddr::new(address, port))
}

fn nobody(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(192, 0, 2, 1).into(),
        Family::Ipv6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::LOCALHOST.into(),
        Family::Ipv6 => Ipv6Addr::LOCALHOST.into(),
    }
}

fn port_not_free(subject: String, port: u16, error: &io::Error) -> Finding {
    match error.kind() {
        io::ErrorKind::AddrInUse => Finding::unknown(
            subject,
            format!("only the rules were looked at: port {port} is in use, probably by the sidecar"),
        ),
        io::ErrorKind::AddrNotAvailable => {
            Finding::unknown(subject, "there is no loopback address of this family, so nothing uses it here")
        }
        _ => Finding::wrong(subject, format!("the sidecar could not listen on port {port}: {error}")),
    }
}

fn is_readable(socket: impl AsFd) -> bool {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut wanted, timeout), Ok(1))
}

fn has_no_route(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable | io::ErrorKind::AddrNotAvailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_one_that_the_settings_redirect() {
        let target = |settings: &Settings, family| target(settings, family).map(|at| at.to_string());
        let settings = Settings::default();
        assert_eq!(target(&settings, Family::Ipv4).as_deref(), Some("192.0.2.1:1"));
        assert_eq!(target(&settings, Family::Ipv6).as_deref(), Some("[2001:db8::1]:1"));
        let settings = Settings {
            include_outbound_networks: vec!["10.0.0.0/8".parse().unwrap()],
            include_outbound_ports: vec!["80".parse().unwrap(), "90-99".parse().unwrap()],
            exclude_outbound_ports: vec!["80-85".parse().unwrap()],
            ..Settings::default()
        };
        assert_eq!(target(&settings, Family::Ipv4).as_deref(), Some("10.0.0.1:90"));
        assert_eq!(target(&settings, Family::Ipv6), None);
        let settings =
            Settings { exclude_outbound_ports: vec!["1-52".parse().unwrap()], ..Settings::default() };
        assert_eq!(target(&settings, Family::Ipv4).as_deref(), Some("192.0.2.1:54"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let plan = plan(&Settings::default()).unwrap();
        assert!(what_is_missing(&plan.ipv4, &plan.ipv4).is_empty());
        let mut present = plan.ipv4.clone();
        present.tables.remove(0);
        present.tables[0].jumps.clear();
        present.tables[1].chains[0].rules.pop();
        let missing = what_is_missing(&plan.ipv4, &present).join("\n");
        for part in ["WEFT_ZONE is missing", "mangle: 0 rules lead", "WEFT_OUTPUT has"] {
            assert!(missing.contains(part), "{part} in {missing}");
        }
    }
}
