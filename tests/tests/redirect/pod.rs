//! Rules in a pod: put there, tried with real connections of several users, and taken away.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, process::Command};

use weft_tests::{Need, Network, Pod, Process, can_run, output_of, program, until};

const PEER: &str = env!("CARGO_BIN_EXE_redirect-peer");
const APP: u32 = 1000;
const SIDECAR: u32 = 1337;
const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("ip", "iproute2"),
    Need::Program("setpriv", "util-linux"),
    Need::Program("iptables-nft", "iptables"),
];

/// `weft-sidecar redirect …` in a pod, as root: whether it worked, and all it printed.
fn redirect(pod: &Pod, arguments: &str) -> (bool, String) {
    let mut command = pod.command(program("weft-sidecar"));
    run(command.arg("redirect").args(arguments.split_whitespace()))
}

fn run(command: &mut Command) -> (bool, String) {
    let output = command.output().expect("a program");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn worked((success, text): (bool, String)) -> String {
    assert!(success, "{text}");
    text
}

fn refused((success, text): (bool, String)) -> String {
    assert!(!success, "{text}");
    text
}

/// All rules of both families without counters, times, and tables in which there is nothing.
fn saved(pod: &Pod, backend: &str) -> String {
    let mut text = String::new();
    for family in ["iptables", "ip6tables"] {
        let all = pod.shell(&format!("{family}-{backend}-save"));
        for table in all.split_inclusive("COMMIT\n") {
            let lines = table.lines().filter(|line| !line.starts_with('#'));
            let lines: Vec<&str> = lines.map(|line| line.split(" [").next().unwrap_or(line)).collect();
            let something =
                |line: &&str| line.starts_with("-A") || line.ends_with(" -") || line.ends_with(" DROP");
            if lines.iter().any(something) {
                text.push_str(&format!("{family} {}\n", lines.join("\n")));
            }
        }
    }
    text
}

/// What a user of a pod hears when dialling: the port it arrived at and the original destination, or an error.
fn dial(pod: &Pod, uid: u32, address: impl ToString) -> String {
    let (_, said) = run(pod.command_as(uid, PEER).args(["dial", &address.to_string()]));
    said.trim().to_owned()
}

fn ask(pod: &Pod, uid: u32, from: &str, to: &str) -> String {
    let (_, said) = run(pod.command_as(uid, PEER).args(["ask", from, to, "name?"]));
    said.trim().to_owned()
}

fn serve(pod: &Pod, uid: u32, addresses: &[&str]) -> Process {
    peer(pod, uid, "serve", addresses)
}

fn peer(pod: &Pod, uid: u32, what: &str, addresses: &[&str]) -> Process {
    let mut process = pod.start_as(uid, PEER, &[&[what], addresses].concat());
    process.wait_for_line("serving");
    process
}

#[test]
fn twice_is_once_and_clean_leaves_nothing() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let pod = network.pod("app");
        for family in ["iptables", "ip6tables"] {
            pod.shell(&format!(
                "{family}-{backend} -t nat -N FOREIGN; {family}-{backend} -t nat -A OUTPUT -p tcp --dport 9 -j FOREIGN; \
                 {family}-{backend} -A INPUT -p icmp -j ACCEPT"
            ));
        }
        let before = saved(&pod, backend);
        // auto takes the one that already has rules
        let text = worked(redirect(&pod, "apply"));
        assert!(text.contains(&format!("iptables-{backend} for IPv4 and IPv6")), "{text}");
        let once = saved(&pod, backend);
        for rule in ["-j WEFT_OUTPUT", "--ctstate INVALID -j DROP", "--zone 1", "--to-ports 15006", "FOREIGN"]
        {
            assert!(once.matches(rule).count() >= 2, "{rule} in both families of {backend}:\n{once}");
        }
        worked(redirect(&pod, &format!("apply --backend {backend}")));
        assert_eq!(saved(&pod, backend), once);

        // other settings replace all that the first ones left
        worked(redirect(&pod, "apply --dns false --ipv6 false --include-outbound-networks 10.0.0.0/8"));
        let other = saved(&pod, backend);
        assert!(!other.contains("WEFT_ZONE") && other.contains("WEFT_NETWORKS"), "{other}");
        assert_eq!(other.matches("-j WEFT_OUTPUT").count(), 1, "{other}");
        worked(redirect(&pod, "apply"));
        assert_eq!(saved(&pod, backend), once);

        worked(redirect(&pod, "clean"));
        assert_eq!(saved(&pod, backend), before);
        assert!(worked(redirect(&pod, "clean")).contains("0 chains"));
    }
}

#[test]
fn the_plan_is_what_is_applied() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let (by_hand, by_weft) = (network.pod("hand"), network.pod("weft"));
    let flags = "--exclude-uids 0,7 --exclude-outbound-ports 81,8000-8999 --exclude-outbound-networks 10.9.0.0/16,fd09::/16";
    let plan = worked(redirect(&by_hand, &format!("plan {flags}")));
    let (ipv4, ipv6) = plan.split_once("# ip6tables-restore").expect("two documents");
    for (program, document) in
        [("iptables-nft-restore", ipv4), ("ip6tables-nft-restore", ipv6.split_once('\n').expect("rules").1)]
    {
        let file = network.folder().join(program);
        fs::write(&file, document).expect("a file");
        by_hand.shell(&format!("{program} --noflush {}", file.display()));
    }
    worked(redirect(&by_weft, &format!("apply --backend nft {flags}")));
    assert_eq!(saved(&by_hand, "nft"), saved(&by_weft, "nft"));
    let json = worked(redirect(&by_hand, "plan -o json"));
    assert!(json.contains("\"WEFT_OUTPUT\""), "{json}");
}

#[test]
fn rules_of_the_other_iptables_are_not_doubled() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let pod = network.pod("app");
    worked(redirect(&pod, "apply --backend legacy"));
    let text = refused(redirect(&pod, "apply --backend nft"));
    assert!(text.contains("redirect clean"), "{text}");
    assert_eq!(saved(&pod, "nft"), "");
    // found again without being told
    assert!(worked(redirect(&pod, "apply")).contains("iptables-legacy"));
    worked(redirect(&pod, "clean"));
    assert_eq!(saved(&pod, "legacy"), "");
}

#[test]
fn when_ipv6_fails_ipv4_is_what_it_was() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let pod = network.pod("app");
    worked(redirect(&pod, "apply --backend nft --exclude-uids 7"));
    let before = saved(&pod, "nft");
    let broken = network.folder().join("ip6tables-nft-restore");
    fs::write(&broken, "#!/bin/sh\necho 'line 2 failed' >&2\nexit 1\n").expect("a program");
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).expect("its mode");
    let path = format!("{}:{}", network.folder().display(), std::env::var("PATH").expect("PATH"));
    let mut command = pod.command(program("weft-sidecar"));
    let text = refused(run(command.args(["redirect", "apply"]).env("PATH", path)));
    for part in
        ["IPv6 rules were not applied", "again what they were", "--ipv6 false", "it meant: :WEFT_ZONE"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(saved(&pod, "nft"), before);
}

#[test]
fn verify_proves_or_tells() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let pod = network.pod("app");
        let text = refused(redirect(&pod, "verify"));
        assert!(text.contains("WEFT_OUTPUT is missing") && text.contains("redirect apply"), "{text}");
        assert!(text.contains("did not arrive at port 15001"), "{text}");

        worked(redirect(&pod, &format!("apply --backend {backend}")));
        let text = worked(redirect(&pod, "verify"));
        for part in [
            "ok      IPv4 connections of the app: one to 192.0.2.1:1 arrived at port 15001",
            "ok      IPv6 connections of the app: one to [2001:db8::1]:1 arrived at port 15001",
            "ok      IPv4 DNS of the app",
            "ok      IPv6 DNS of the app",
            "unknown connections from other hosts",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        // root is excluded: verify acts as somebody else
        worked(redirect(&pod, "apply --exclude-uids 0"));
        assert!(
            !worked(redirect(&pod, "verify --exclude-uids 0"))
                .contains("only the rules were looked at: user")
        );
        // the sidecar is there already
        let _sidecar = serve(&pod, SIDECAR, &["127.0.0.1:15001", "[::1]:15001"]);
        assert!(worked(redirect(&pod, "verify --exclude-uids 0")).contains("port 15001 is in use"));
        // somebody has been at the rules
        pod.shell(&format!("iptables-{backend} -t nat -F WEFT_REDIRECT"));
        let text = refused(redirect(&pod, "verify --exclude-uids 0"));
        assert!(text.contains("WEFT_REDIRECT has 0 rules, expected 1"), "{text}");
    }
}

#[test]
fn a_pod_without_ipv6_needs_no_settings() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let pod = network.pod("app");
    pod.shell("sysctl -w net.ipv6.conf.all.disable_ipv6=1");
    worked(redirect(&pod, "apply"));
    let text = worked(redirect(&pod, "verify"));
    assert!(text.contains("ok      IPv4 DNS") && text.contains("unknown IPv6 DNS"), "{text}");
}

#[test]
fn two_capabilities_are_enough() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let pod = network.pod("app");
        let capable = |verb| {
            let mut command = pod.command("setpriv");
            command.args(["--bounding-set=-all,+net_admin,+net_raw", "--no-new-privs", "--"]);
            worked(run(command.arg(program("weft-sidecar")).args(["redirect", verb, "--backend", backend])))
        };
        capable("apply");
        assert!(capable("verify").contains("ok      IPv4 connections"));
        capable("clean");
        assert_eq!(saved(&pod, backend), "");
    }
}

#[test]
fn mistakes_and_missing_rights_have_a_way_out() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let pod = network.pod("app");
    let text = refused(redirect(&pod, "apply --dns-port 15001 --sidecar-uid 0"));
    assert!(text.contains("both 15001") && text.contains("user is 0"), "{text}");
    assert_eq!(saved(&pod, "nft"), "");
    let (_folder, sidecar) = weft_tests::program_for_everyone(&program("weft-sidecar"));
    for backend in ["nft", "legacy"] {
        let mut command = pod.command_as(APP, &sidecar);
        let text = refused(run(command.args(["redirect", "apply", "--backend", backend])));
        assert!(text.contains("NET_ADMIN"), "{text}");
    }
}

#[test]
fn connections_of_the_app_go_to_the_sidecar() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let (pod, other) = (network.pod("app"), network.pod("other"));
        worked(redirect(&pod, &format!("apply --backend {backend} --exclude-uids 999")));
        let _sidecar = serve(&pod, SIDECAR, &["127.0.0.1:15001", "[::1]:15001"]);
        let _app = serve(&pod, APP, &["0.0.0.0:8080", "[::]:8080"]);
        let _other = serve(&other, APP, &["0.0.0.0:8080", "[::]:8080", "0.0.0.0:15020", "[::]:15020"]);
        let at = |pod: &Pod, port| [SocketAddr::new(pod.ipv4(), port), SocketAddr::new(pod.ipv6(), port)];
        for nobody in ["192.0.2.7:80", "[2001:db8::7]:443", "240.0.0.9:3306"] {
            assert_eq!(dial(&pod, APP, nobody), format!("15001 {nobody}"));
        }
        for there in at(&other, 8080) {
            assert_eq!(dial(&pod, APP, there), format!("15001 {there}"));
            assert_eq!(dial(&pod, SIDECAR, there), format!("8080 {there}"));
            assert_eq!(dial(&pod, 999, there), format!("8080 {there}"));
        }
        // another sidecar's probes and metrics
        for there in at(&other, 15020) {
            assert_eq!(dial(&pod, APP, there), format!("15020 {there}"));
        }
        // the app's own address is the sidecar's to handle, its own loopback is not
        for own in at(&pod, 8080) {
            assert_eq!(dial(&pod, APP, own), format!("15001 {own}"));
            assert_eq!(dial(&pod, SIDECAR, own), format!("8080 {own}"));
        }
        for own in ["127.0.0.1:8080", "[::1]:8080"] {
            assert_eq!(dial(&pod, APP, own), format!("8080 {own}"));
            assert_eq!(dial(&pod, SIDECAR, own), format!("8080 {own}"));
        }
    }
}

#[test]
fn included_and_excluded_ports_and_networks() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let (pod, other) = (network.pod("app"), network.pod("other"));
        let _sidecar = serve(&pod, SIDECAR, &["127.0.0.1:15001", "[::1]:15001"]);
        let served = ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:8081", "[::]:8081", "0.0.0.0:8082", "[::]:8082"];
        let _other = serve(&other, APP, &served);
        let redirected = |address: SocketAddr| {
            let said = dial(&pod, APP, address);
            assert!(said.ends_with(&address.to_string()), "{said}");
            said.starts_with("15001 ")
        };
        for (flags, ipv4, ipv6) in [
            ("", [true, true, true], [true, true, true]),
            ("--exclude-outbound-ports 8081-8082", [true, false, false], [true, false, false]),
            ("--include-outbound-ports 8080,8082", [true, false, true], [true, false, true]),
            ("--exclude-outbound-networks 10.77.0.0/16", [false, false, false], [true, true, true]),
            ("--exclude-outbound-networks fd77::2", [true, true, true], [false, false, false]),
            ("--include-outbound-networks 10.77.0.2,fd00::/16", [true, true, true], [false, false, false]),
            (
                "--include-outbound-networks 10.0.0.0/8 --include-outbound-ports 8081-8082 --exclude-outbound-ports 8082",
                [false, true, false],
                [false, false, false],
            ),
        ] {
            worked(redirect(&pod, &format!("apply --backend {backend} {flags}")));
            for (address, expected) in [(other.ipv4(), ipv4), (other.ipv6(), ipv6)] {
                let seen = [8080, 8081, 8082].map(|port| redirected(SocketAddr::new(address, port)));
                assert_eq!(seen, expected, "{address} with {backend} and `{flags}`");
            }
            // our own virtual addresses always
            assert_eq!(dial(&pod, APP, "240.0.0.1:8082"), "15001 240.0.0.1:8082", "{flags}");
        }
    }
}

#[test]
fn connections_from_outside_go_to_the_sidecar() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let (pod, other) = (network.pod("app"), network.pod("other"));
        let _sidecar = serve(
            &pod,
            SIDECAR,
            &[
                "0.0.0.0:15006",
                "[::]:15006",
                "0.0.0.0:15020",
                "[::]:15020",
                "127.0.0.1:15001",
                "127.0.0.1:15053",
            ],
        );
        let _app = serve(&pod, 0, &["0.0.0.0:8080", "[::]:8080", "0.0.0.0:22", "[::]:22", "127.0.0.1:9000"]);
        let arrives = |port: u16| {
            [pod.ipv4(), pod.ipv6()].map(|address| {
                let said = dial(&other, APP, SocketAddr::new(address, port));
                let (arrived, original) = said.split_once(' ').expect(&said);
                assert_eq!(original, SocketAddr::new(address, port).to_string());
                arrived.parse::<u16>().expect("a port")
            })
        };
        worked(redirect(&pod, &format!("apply --backend {backend} --exclude-inbound-ports 22")));
        // a listener on loopback (9000, 15001, 15053) is met as the sidecar's port, which then decides
        for port in [8080, 9000, 15001, 15053, 15006, 1] {
            assert_eq!(arrives(port), [15006, 15006], "{port} with {backend}");
        }
        assert_eq!(arrives(15020), [15020, 15020]);
        assert_eq!(arrives(22), [22, 22]);
        worked(redirect(&pod, &format!("apply --backend {backend} --include-inbound-ports 8080-8089")));
        assert_eq!(arrives(8080), [15006, 15006]);
        assert_eq!(arrives(22), [22, 22]);
    }
}

#[test]
fn dns_of_app_and_sidecar_are_two_connections() {
    if !can_run(&NEEDS) {
        return;
    }
    for backend in ["nft", "legacy"] {
        let network = Network::new();
        let (pod, resolver) = (network.pod("app"), network.pod("resolver"));
        worked(redirect(&pod, &format!("apply --backend {backend}")));
        let _sidecar = peer(&pod, SIDECAR, "answer", &["127.0.0.1:15053", "[::1]:15053"]);
        let _sidecar_tcp = serve(&pod, SIDECAR, &["127.0.0.1:15053", "[::1]:15053"]);
        let _resolver = peer(&resolver, 0, "answer", &["0.0.0.0:53", "[::]:53"]);
        for (own, server, to) in [
            (pod.ipv4(), resolver.ipv4(), "10.77.0.2:53".to_owned()),
            (pod.ipv6(), resolver.ipv6(), format!("[{}]:53", resolver.ipv6())),
        ] {
            let from = SocketAddr::new(own, 5555).to_string();
            // the same addresses and ports: only the zone tells them apart
            for _ in 0..2 {
                assert_eq!(ask(&pod, APP, &from, &to), "15053 name?", "{server} with {backend}");
                assert_eq!(ask(&pod, SIDECAR, &from, &to), "53 name?", "{server} with {backend}");
            }
            let family = if own.is_ipv4() { "iptables" } else { "ip6tables" };
            // TCP arrives; its original destination is not known as it is in another zone
            assert!(dial(&pod, APP, &to).starts_with("15053 "), "{}", dial(&pod, APP, &to));
            // without the zones the sidecar would ask itself
            pod.shell(&format!("{family}-{backend} -t raw -F WEFT_ZONE"));
            let from = SocketAddr::new(own, 5556).to_string();
            assert_eq!(ask(&pod, APP, &from, &to), "15053 name?");
            assert_eq!(ask(&pod, SIDECAR, &from, &to), "15053 name?");
        }
        // a resolver on the pod's own loopback
        worked(redirect(&pod, "apply"));
        assert_eq!(ask(&pod, APP, "127.0.0.1:5557", "127.0.0.53:53"), "15053 name?");
        worked(redirect(&pod, "apply --dns false"));
        assert_eq!(ask(&pod, APP, "10.77.0.1:5558", "10.77.0.2:53"), "53 name?");
    }
}

#[test]
fn everything_is_gone_after_a_test() {
    if !can_run(&NEEDS) {
        return;
    }
    let network = Network::new();
    let pod = network.pod("app");
    let name = pod.netns().name().to_owned();
    let mut process = pod.start("sleep", &["1000"]);
    until("the program is inside", || pod.netns().processes().contains(&process.id()));
    drop(pod);
    assert!(!process.wait().success());
    let mut list = Command::new("ip");
    list.args(["netns", "list"]);
    assert!(!output_of(list).contains(&name));
}
