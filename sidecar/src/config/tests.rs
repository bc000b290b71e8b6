use std::{fs, time::Duration};

use clap::Command;

use super::{Config, ConsulAddress, ConsulToken, InvalidSettings, KEYS, Mode, Written, arguments};
use crate::model::MutualTls;

fn read(flags: &[&str], variables: &[(&str, &str)]) -> Result<Config, InvalidSettings> {
    let flags = Command::new("test").no_binary_name(true).args(arguments()).get_matches_from(flags);
    let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    Config::check(&Written::read(&flags, variables), ([0, 0, 0, 0], 15020).into())
}

#[test]
fn the_defaults_need_a_service_and_nothing_else() {
    let config = read(&["--service", "orders"], &[]).unwrap();
    assert_eq!(config.own.service.as_str(), "orders");
    assert_eq!(config.mode, Mode::AllowAny);
    assert_eq!(config.outbound_mutual_tls, MutualTls::Permissive);
    assert_eq!(config.app.mutual_tls, MutualTls::Permissive);
    assert!(config.authority.is_none());
}

#[test]
fn flags_win_over_variables_and_variables_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weft.yaml");
    fs::write(&file, "service: from-file\nzone: from-file\ninstance: from-file\nport: [1, 2]\n").unwrap();
    let config = read(
        &["--config", file.to_str().unwrap(), "--service", "from-flag"],
        &[("WEFT_SERVICE", "from-variable"), ("WEFT_ZONE", "from-variable"), ("HOME", "/")],
    )
    .unwrap();
    assert_eq!(config.own.service.as_str(), "from-flag");
    assert_eq!(config.own.zone.as_deref(), Some("from-variable"));
    assert_eq!(config.own.instance, "from-file");
    assert_eq!(config.app.ports, [1, 2]);
}

#[test]
fn all_mistakes_are_told_at_once_each_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weft.yaml");
    fs::write(&file, "service: Orders\nserivces-dir: /\nworkers: [1, 2]\nmax-streams: many\n").unwrap();
    let shown = file.display().to_string();
    let InvalidSettings(mistakes) = read(
        &["--config", &shown, "--port", "8080", "--inbound-port", "8080", "--token-file", "/nowhere/token"],
        &[("WEFT_MODE", "allow"), ("WEFT_SERIVCE", "x"), ("WEFT_PORT", "0")],
    )
    .unwrap_err();
    let all = mistakes.join("\n");
    for expected in [
        &format!("{shown}:1: `service` is \"Orders\""),
        &format!("{shown}:2: `serivces-dir` is no setting"),
        &format!("{shown}:3: `workers`: expected one value"),
        &format!(
            "{shown}:4: `max-streams` is \"many\" (out of range); expected a whole number from 1 to 10000"
        ),
        "--token-file: `token-file` is \"/nowhere/token\" (No such file",
        "WEFT_MODE: `mode` is \"allow\" (unknown); expected allow-any or registry-only",
        "WEFT_SERIVCE: no such setting",
    ] {
        assert!(all.contains(expected), "{expected}\nis not in\n{all}");
    }
}

#[test]
fn variables_that_kubernetes_writes_for_services_are_no_settings() {
    let config = read(
        &["--service", "orders"],
        &[
            ("WEFT_SERVICE_HOST", "10.96.0.7"),
            ("WEFT_SERVICE_PORT", "80"),
            ("WEFT_SERVICE_PORT_HTTP", "80"),
            ("WEFT_PORT", "tcp://10.96.0.7:80"),
            ("WEFT_PORT_80_TCP", "tcp://10.96.0.7:80"),
            ("WEFT_PORT_80_TCP_PROTO", "tcp"),
            ("WEFT_PORT_80_TCP_PORT", "80"),
            ("WEFT_PORT_80_TCP_ADDR", "10.96.0.7"),
            ("WEFT_CA_SERVICE_HOST", "10.96.0.8"),
            ("WEFT_CA_PORT_15080_TCP_PORT", "15080"),
            ("WEFT_DNS_PORT", "udp://10.96.0.9:53"),
            ("WEFT_DNS_PORT_53_UDP", "udp://10.96.0.9:53"),
            ("WEFT_INBOUND_PORT", "16006"),
        ],
    )
    .unwrap();
    assert_eq!((config.ports.inbound, config.app.ports.len()), (16006, 0));
    // What only looks like it is a mistake as ever.
    for (name, value) in [("WEFT_PORT", "tcp"), ("WEFT_PORT_X_TCP", "80"), ("WEFT_SERVICE_PROT", "1")] {
        assert!(read(&["--service", "orders"], &[(name, value)]).is_err(), "{name}");
    }
}

#[test]
fn a_state_directory_may_be_one_that_is_yet_to_be_made() {
    let folder = tempfile::tempdir().unwrap();
    let (new, lost) = (folder.path().join("new"), folder.path().join("no/new"));
    let with = |path: &std::path::Path| read(&["--service", "a", "--state-dir", path.to_str().unwrap()], &[]);
    assert_eq!(with(&new).unwrap().stores.state_dir, Some(new));
    assert!(with(&lost).is_err());
}

#[test]
fn two_listeners_on_one_port_are_a_mistake() {
    let InvalidSettings(mistakes) =
        read(&["--service", "a", "--port", "8080", "--inbound-port", "8080"], &[]).unwrap_err();
    assert_eq!(mistakes, ["--port: port 8080 is taken by --inbound-port; expected another"]);
    let InvalidSettings(mistakes) =
        read(&["--service", "a", "--upstream", "127.0.0.1:9000=b", "--upstream", "127.0.0.1:9000=c"], &[])
            .unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
}

#[test]
fn an_authority_needs_something_to_recognise_it_by() {
    let InvalidSettings(mistakes) = read(&["--service", "a", "--authority", "ca:15080"], &[]).unwrap_err();
    assert!(mistakes[0].contains("nothing to recognise the authority by"), "{mistakes:?}");
    let hash = "ab".repeat(32);
    let config =
        read(&["--service", "a", "--authority", "ca:15080", "--authority-sha256", &hash], &[]).unwrap();
    assert_eq!(config.authority.unwrap().address, "ca:15080");
}

#[test]
fn every_setting_has_help_and_a_name_of_its_own() {
    let mut names: Vec<_> = KEYS.iter().map(|key| key.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), KEYS.len());
    assert!(KEYS.iter().all(|key| !key.help.is_empty() && !key.value.is_empty()));
    let config = read(&["--service", "a", "--settle-time", "1500ms"], &[]).unwrap();
    assert_eq!(config.drain.settle, Duration::from_millis(1500));
}

#[test]
fn a_drain_has_an_end_that_a_clock_can_show() {
    for name in ["--settle-time", "--drain-timeout"] {
        for bad in ["25h", "584554530000y"] {
            let mistakes = read(&["--service", "a", name, bad], &[]).unwrap_err().to_string();
            assert!(mistakes.contains("at most 1d"), "{mistakes}");
        }
        assert!(read(&["--service", "a", name, "1d"], &[]).is_ok());
    }
}

#[test]
fn consul_is_found_by_its_own_variables_too() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, "secret").unwrap();
    let token = token.to_str().unwrap();
    assert!(read(&["--service", "a"], &[]).unwrap().stores.consul.is_none());
    let variables = [
        ("CONSUL_HTTP_ADDR", "10.0.0.1:8501"),
        ("CONSUL_HTTP_SSL", "true"),
        ("CONSUL_HTTP_SSL_VERIFY", "0"),
        ("CONSUL_HTTP_TOKEN", "secret"),
    ];
    let consul = read(&["--service", "a"], &variables).unwrap().stores.consul.unwrap();
    let address = ConsulAddress::Tcp { tls: true, host: "10.0.0.1".to_owned(), port: 8501 };
    assert_eq!(consul.addresses, [address]);
    assert_eq!((consul.token, consul.tls.verify), (ConsulToken::Variable, false));
    let flags = ["--service", "a", "--consul", "a:1", "--consul", "b:2", "--consul-token-file", token];
    let config = read(&flags, &variables).unwrap();
    assert!(!serde_json::to_string(&config).unwrap().contains("secret"));
    let consul = config.stores.consul.unwrap();
    assert_eq!(consul.addresses.len(), 2);
    assert_eq!(consul.token, ConsulToken::File(token.into()));
    let InvalidSettings(mistakes) = read(
        &["--service", "a", "--consul-certificate", token, "--probe", "udp"],
        &[("CONSUL_HTTP_SSL", "maybe")],
    )
    .unwrap_err();
    let all = mistakes.join("\n");
    for expected in
        ["--consul-certificate: stands without", "CONSUL_HTTP_SSL: `consul-tls` is", "`probe` is \"udp\""]
    {
        assert!(all.contains(expected), "{expected}: {all}");
    }
}
