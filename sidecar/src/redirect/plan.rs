//! From settings to rules: pure. Two plans: one for a pod, whose sidecar lives beside the app under a user of its
//! own, and one for a namespace of `exec`, whose sidecar stays outside. The reason of each rule: docs/redirect.md.
//! The golden files in `golden/` are what `redirect plan` prints.

use anyhow::{Result, bail};
use serde::Serialize;

use super::{
    rules::{Chain, Family, Jump, Rules, Table},
    settings::{DNS, Network, PortRange, Settings},
};

/// The conntrack zone of the app's DNS. The sidecar's own queries stay in the default zone 0, so that a query of
/// each from the same port to the same server are two connections, and only one of them is redirected.
const APP_DNS_ZONE: u16 = 1;
/// Marks connections that the sidecar makes inside a namespace of `exec`: they are not redirected. Setting a
/// mark takes a capability that the command there does not have.
pub(super) const SIDECAR_MARK: u32 = 0x1337;
/// Where our DNS takes virtual addresses from; nothing else lives there (RFC 1112, section 4).
const VIRTUAL_ADDRESSES: &str = "240.0.0.0/4";

/// All rules of a redirect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// For `iptables`.
    pub ipv4: Rules,
    /// For `ip6tables`; nothing if IPv6 is left alone.
    pub ipv6: Option<Rules>,
}

/// Plans the redirect of a pod.
///
/// # Errors
/// All mistakes in the settings at once.
pub fn plan(settings: &Settings) -> Result<Plan> {
    let mistakes = settings.mistakes();
    if !mistakes.is_empty() {
        bail!("the redirect cannot be planned:\n  {}", mistakes.join("\n  "));
    }
    let ipv6 = settings.ipv6.then(|| pod(settings, Family::Ipv6));
    Ok(Plan { ipv4: pod(settings, Family::Ipv4), ipv6 })
}

/// Plans the redirect inside a namespace of `exec`: nothing leaves but through the sidecar, and the command's
/// own loopback stays its own.
pub fn namespace_plan(outbound_port: u16, dns_port: u16, ipv6: bool) -> Plan {
    let rules = |family| {
        let mut output = vec![format!("-m mark --mark {SIDECAR_MARK:#x} -j RETURN")];
        output.extend(dns_redirect(dns_port));
        output.push(format!("-d {} -j RETURN", loopback(family)));
        output.push("-p tcp -j WEFT_REDIRECT".to_owned());
        let chains = vec![chain("WEFT_OUTPUT", output), redirect("WEFT_REDIRECT", outbound_port)];
        Rules { tables: vec![table("nat", chains, vec![jump("OUTPUT", "-j WEFT_OUTPUT")])] }
    };
    Plan { ipv4: rules(Family::Ipv4), ipv6: ipv6.then(|| rules(Family::Ipv6)) }
}

/// The plan as people read it and as `iptables-restore --noflush` takes it where nothing of ours is present.
///
/// # Errors
/// As [`plan`].
pub fn plan_text(settings: &Settings) -> Result<String> {
    let plan = plan(settings)?;
    let nothing = Rules::default();
    let mut text = format!("# iptables-restore --noflush\n{}", plan.ipv4.document(&nothing));
    if let Some(ipv6) = &plan.ipv6 {
        text.push_str("\n# ip6tables-restore --noflush\n");
        text.push_str(&ipv6.document(&nothing));
    }
    Ok(text)
}

fn pod(settings: &Settings, family: Family) -> Rules {
    let mut tables = Vec::new();
    if settings.dns {
        tables.push(zones(settings));
    }
    tables.push(no_invalid_packets());
    tables.push(table(
        "nat",
        outbound(settings, family).into_iter().chain(inbound(settings)).collect(),
        vec![jump("OUTPUT", "-j WEFT_OUTPUT"), jump("PREROUTING", "-p tcp -j WEFT_INBOUND")],
    ));
    Rules { tables }
}

/// Puts the app's DNS, both directions, in a conntrack zone of its own. On loopback a packet keeps the zone that
/// it got on the way out, so `PREROUTING` needs no rule.
fn zones(settings: &Settings) -> Table {
    let mut rules = Vec::new();
    for protocol in ["udp", "tcp"] {
        // the sidecar's answers; by port and not by user, as packets that the kernel sends have no user
        rules.push(format!("-p {protocol} --sport {} -j CT --zone {APP_DNS_ZONE}", settings.dns_port));
    }
    rules.extend(not_redirected_users(settings));
    for protocol in ["udp", "tcp"] {
        rules.push(format!("-p {protocol} --dport {DNS} -j CT --zone {APP_DNS_ZONE}"));
    }
    table("raw", vec![chain("WEFT_ZONE", rules)], vec![jump("OUTPUT", "-j WEFT_ZONE")])
}

/// A packet that belongs to no known connection would pass by the address translation and reach the app or make
/// the kernel reset a good connection.
fn no_invalid_packets() -> Table {
    let rules = vec!["-m conntrack --ctstate INVALID -j DROP".to_owned()];
    table("mangle", vec![chain("WEFT_INVALID", rules)], vec![jump("PREROUTING", "-p tcp -j WEFT_INVALID")])
}

fn outbound(settings: &Settings, family: Family) -> Vec<Chain> {
    let mut output = not_redirected_users(settings);
    if settings.dns {
        output.extend(dns_redirect(settings.dns_port));
        if family == Family::Ipv4 {
            // before all exclusions: nobody but the sidecar can do anything with such an address
            output.push(format!("-d {VIRTUAL_ADDRESSES} -p tcp -j WEFT_REDIRECT"));
        }
    }
    output.push(format!("-d {} -j RETURN", loopback(family)));
    output.push(format!("-p tcp --dport {} -j RETURN", settings.admin_port));
    for network in of_family(&settings.exclude_outbound_networks, family) {
        output.push(format!("-d {network} -j RETURN"));
    }
    output.extend(to_ports(&settings.exclude_outbound_ports, "RETURN"));
    let all_networks = settings.include_outbound_networks.is_empty();
    let target = if all_networks { "WEFT_REDIRECT" } else { "WEFT_NETWORKS" };
    output.extend(to_ports_or_all(&settings.include_outbound_ports, target));

    let mut chains = vec![chain("WEFT_OUTPUT", output)];
    if !all_networks {
        let networks = of_family(&settings.include_outbound_networks, family);
        let rules = networks.map(|network| format!("-d {network} -j WEFT_REDIRECT")).collect();
        chains.push(chain("WEFT_NETWORKS", rules));
    }
    chains.push(redirect("WEFT_REDIRECT", settings.outbound_port));
    chains
}

fn inbound(settings: &Settings) -> Vec<Chain> {
    let mut rules = vec![
        "-i lo -j RETURN".to_owned(),
        // what a pod forwards, for example from containers inside it, is not its own
        "-m addrtype ! --dst-type LOCAL -j RETURN".to_owned(),
        format!("-p tcp --dport {} -j RETURN", settings.admin_port),
    ];
    rules.extend(to_ports(&settings.exclude_inbound_ports, "RETURN"));
    rules.extend(to_ports_or_all(&settings.include_inbound_ports, "WEFT_IN_REDIRECT"));
    vec![chain("WEFT_INBOUND", rules), redirect("WEFT_IN_REDIRECT", settings.inbound_port)]
}

fn not_redirected_users(settings: &Settings) -> Vec<String> {
    let users = std::iter::once(&settings.sidecar_uid).chain(&settings.exclude_uids);
    users.map(|uid| format!("-m owner --uid-owner {uid} -j RETURN")).collect()
}

fn dns_redirect(port: u16) -> [String; 2] {
    ["udp", "tcp"].map(|protocol| format!("-p {protocol} --dport {DNS} -j REDIRECT --to-ports {port}"))
}

fn to_ports(ports: &[PortRange], target: &str) -> Vec<String> {
    ports.iter().map(|range| format!("-p tcp --dport {} -j {target}", range.in_a_rule())).collect()
}

fn to_ports_or_all(ports: &[PortRange], target: &str) -> Vec<String> {
    if ports.is_empty() { vec![format!("-p tcp -j {target}")] } else { to_ports(ports, target) }
}

fn of_family(networks: &[Network], family: Family) -> impl Iterator<Item = &Network> {
    networks.iter().filter(move |network| network.address().is_ipv4() == (family == Family::Ipv4))
}

fn loopback(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "127.0.0.0/8",
        Family::Ipv6 => "::1/128",
    }
}

fn redirect(name: &str, port: u16) -> Chain {
    chain(name, vec![format!("-p tcp -j REDIRECT --to-ports {port}")])
}

fn chain(name: &str, rules: Vec<String>) -> Chain {
    Chain { name: name.to_owned(), rules }
}

fn jump(from: &str, rule: &str) -> Jump {
    Jump { from: from.to_owned(), rule: rule.to_owned() }
}

fn table(name: &str, chains: Vec<Chain>, jumps: Vec<Jump>) -> Table {
    Table { name: name.to_owned(), chains, jumps }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, fs, path::Path};

    /// Compares with a golden file; with `WEFT_GOLDEN=write` writes it instead.
    fn golden(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/redirect/golden").join(name);
        if env::var("WEFT_GOLDEN").as_deref() == Ok("write") {
            fs::write(&path, text).unwrap();
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, expected, "{name} differs; if that is meant, run again with WEFT_GOLDEN=write");
    }

    fn list<T: std::str::FromStr<Err = String>>(text: &str) -> Vec<T> {
        text.split(',').map(|part| part.parse().unwrap()).collect()
    }

    #[test]
    fn the_default_plan() {
        golden("default.txt", &plan_text(&Settings::default()).unwrap());
    }

    #[test]
    fn a_plan_with_all_settings() {
        let settings = Settings {
            sidecar_uid: 2000,
            outbound_port: 16001,
            inbound_port: 16006,
            admin_port: 16020,
            dns_port: 16053,
            include_outbound_ports: list("80,8000-8999"),
            exclude_outbound_ports: list("8443,9000-9100"),
            include_outbound_networks: list("10.0.0.0/8,fd00::/8"),
            exclude_outbound_networks: list("10.9.0.0/16,fd09::/16,192.0.2.1"),
            exclude_uids: vec![0, 999],
            include_inbound_ports: list("8080,9090-9099"),
            exclude_inbound_ports: list("22,9095"),
            ..Settings::default()
        };
        golden("everything.txt", &plan_text(&settings).unwrap());
    }

    #[test]
    fn a_plan_without_dns_and_ipv6() {
        let settings = Settings { dns: false, ipv6: false, ..Settings::default() };
        golden("tcp-ipv4-only.txt", &plan_text(&settings).unwrap());
    }

    #[test]
    fn the_plan_of_a_namespace() {
        let plan = namespace_plan(15001, 15053, true);
        let nothing = Rules::default();
        let text =
            format!("{}\n{}", plan.ipv4.document(&nothing), plan.ipv6.as_ref().unwrap().document(&nothing));
        golden("namespace.txt", &text);
        assert!(namespace_plan(15001, 15053, false).ipv6.is_none());
    }

    #[test]
    fn the_plan_as_json() {
        let settings = Settings { dns: false, ipv6: false, ..Settings::default() };
        let text = serde_json::to_string_pretty(&plan(&settings).unwrap()).unwrap();
        golden("tcp-ipv4-only.json", &text);
    }

    #[test]
    fn settings_with_mistakes_are_refused() {
        let error = plan(&Settings { dns_port: 15001, ..Settings::default() }).unwrap_err().to_string();
        assert!(error.contains("both 15001"), "{error}");
    }

    #[test]
    fn names_of_chains_fit_the_kernel() {
        let plan = plan(&Settings::default()).unwrap();
        for table in &plan.ipv4.tables {
            for chain in &table.chains {
                assert!(chain.name.len() <= 28, "{}", chain.name);
            }
        }
    }
}
