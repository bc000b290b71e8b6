//! redis-cli, where the client speaks first, mariadb, where the server does, and psql, which asks for TLS in the middle;
//! nobody declares a protocol.

use std::{fs, os::unix::fs::PermissionsExt};

use nix::unistd::chown;
use weft_tests::{Need, Pod, output_of};

use super::pair::{Pair, ROOT, can_run, wait_for_port};

#[test]
fn redis_cli_sees_the_same() {
    let redis =
        [ROOT, Need::Program("redis-server", "redis-server"), Need::Program("redis-cli", "redis-tools")];
    if !can_run(&redis) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("redis").display().to_string();
    let arguments = ["--port", "6379", "--save", "", "--protected-mode", "no", "--dir", &folder];
    let _redis = pair.server.start("redis-server", &arguments);
    wait_for_port(&pair.server, 6379);
    let direct = redis_session(&pair.client);
    assert!(direct.contains("1000000"), "{direct}");
    pair.weave(&[("orders", 6379)]);
    assert_eq!(redis_session(&pair.client), direct);
    pair.assert_secured();
}

/// Single commands, a large value each way, a transaction, a mass insert, and a message to a subscriber.
fn redis_session(pod: &Pod) -> String {
    pod.shell(
        r#"
        cli="redis-cli -h orders"
        $cli FLUSHALL
        $cli PING
        $cli SET key value
        $cli GET key
        head -c 20000000 /dev/zero | tr '\0' x | $cli -x SET large
        $cli GET large | sha256sum
        printf 'MULTI\nINCR n\nINCR n\nEXEC\n' | $cli
        seq 1000000 1000100 | sed 's/^/RPUSH list /' | $cli --pipe | tail -1
        $cli LRANGE list 0 2
        $cli NOSUCH 2>&1
        $cli --csv SUBSCRIBE channel >subscribed & subscriber=$!
        until [ "$($cli PUBLISH channel message)" = 1 ]; do sleep 0.02; done
        until grep -q '"message","channel","message"' subscribed; do sleep 0.02; done
        kill $subscriber; wait $subscriber || true
        cat subscribed; rm subscribed
        "#,
    )
}

#[test]
fn the_mariadb_client_sees_the_same_and_does_not_stall() {
    let mariadb = [
        ROOT,
        Need::Program("mariadbd", "mariadb-server"),
        Need::Program("mariadb-install-db", "mariadb-server"),
        Need::Program("mariadb", "mariadb-client"),
    ];
    if !can_run(&mariadb) {
        return;
    }
    const USER: u32 = 1000;
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("mariadb");
    chown(&folder, Some(USER.into()), Some(USER.into())).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let data = format!("--datadir={}/data", folder.display());
    let mut install = pair.server.command_as(USER, "mariadb-install-db");
    install.args(["--no-defaults", &data, "--auth-root-authentication-method=normal", "--skip-test-db"]);
    install.args(SMALL);
    output_of(install);
    fs::write(
        folder.join("init"),
        "CREATE DATABASE shop;\nCREATE USER app@'%' IDENTIFIED BY 'secret';\nGRANT ALL ON shop.* TO app@'%';\n",
    )
    .unwrap();
    let socket = format!("--socket={}/socket", folder.display());
    let init = format!("--init-file={}/init", folder.display());
    let mut arguments = vec!["--no-defaults", &data, &socket, &init, "--port=3306", "--skip-name-resolve"];
    arguments.extend(SMALL);
    let _server = pair.server.start_as(USER, "mariadbd", &arguments);
    wait_for_port(&pair.server, 3306);
    let direct = mariadb_session(&pair.client);
    let denied = |caller: &str| format!("Access denied for user 'app'@'{caller}'");
    // the app sees its own sidecar as the caller: a documented difference
    let client = pair.client.ipv4().to_string();
    assert!(direct.contains(&denied(&client)), "{direct}");
    let direct = direct.replace(&denied(&client), &denied("127.0.0.1"));
    pair.weave(&[("orders", 3306)]);
    assert_eq!(mariadb_session(&pair.client), direct);
    pair.assert_secured();
}

/// So that the server starts quickly.
const SMALL: [&str; 4] = [
    "--innodb-buffer-pool-size=8M",
    "--innodb-log-file-size=4M",
    "--innodb-flush-method=nosync",
    "--skip-log-bin",
];

fn mariadb_session(pod: &Pod) -> String {
    pod.shell(
        r#"
        db() { mariadb --no-defaults -h orders -P 3306 -u app --connect-timeout=5 "$@"; }
        db -psecret shop -e "DROP TABLE IF EXISTS t; CREATE TABLE t (id INT PRIMARY KEY, v LONGTEXT)"
        db -psecret shop -e "INSERT INTO t VALUES (1, 'ä'), (2, REPEAT('x', 5000000)); SELECT COUNT(*), SUM(LENGTH(v)) FROM t"
        db -psecret shop --raw -N -e "SELECT v FROM t WHERE id = 2" | sha256sum
        db -psecret shop -e "SELECT 1; SELEC 2" 2>&1 || true
        db -pwrong shop -e "SELECT 1" 2>&1 || true
        "#,
    )
}

#[test]
fn psql_over_tls_sees_the_same_and_its_sessions_end_without_a_failure() {
    if !can_run(&[ROOT, Need::Program("psql", "postgresql"), Need::Program("openssl", "openssl")]) {
        return;
    }
    /// `nobody`: PostgreSQL does not run as root, and looks its user up.
    const USER: u32 = 65534;
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("postgres");
    chown(&folder, Some(USER.into()), Some(USER.into())).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    // Debian keeps the server's programs out of the way, by their version.
    let newest = "ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1";
    let programs = pair.server.shell(newest).trim().to_owned();
    let data = folder.join("data").display().to_string();
    let mut initdb = pair.server.command_as(USER, format!("{programs}/initdb"));
    initdb.args(["-D", &data, "-U", "app", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"]);
    output_of(initdb);
    fs::write(format!("{data}/pg_hba.conf"), "hostssl all all all trust\n").unwrap();
    let mut certify = pair.server.command_as(USER, "openssl");
    let (key, certificate) = (format!("{data}/server.key"), format!("{data}/server.crt"));
    certify.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    certify.args(["-subj", "/CN=orders", "-keyout", &key, "-out", &certificate]);
    output_of(certify);
    let settings = ["ssl=on", "fsync=off", "listen_addresses=*", "unix_socket_directories=", "port=5432"];
    let mut arguments = vec!["-D", data.as_str()];
    settings.iter().for_each(|setting| arguments.extend(["-c", setting]));
    let _server = pair.server.start_as(USER, format!("{programs}/postgres"), &arguments);
    wait_for_port(&pair.server, 5432);
    let direct = psql_sessions(&pair.client);
    assert_eq!(direct.lines().filter(|line| *line == "t|1000000").count(), PSQL_SESSIONS, "{direct}");
    pair.weave(&[("orders", 5432)]);
    assert_eq!(psql_sessions(&pair.client), direct);
    pair.assert_secured();
    for sidecar in [pair.from.as_ref().unwrap(), pair.to.as_ref().unwrap()] {
        let log = sidecar.access_log();
        let sessions: Vec<_> = log.iter().filter(|line| line["protocol"] == "tcp").collect();
        assert_eq!(sessions.len(), PSQL_SESSIONS, "{log:?}");
        assert!(sessions.iter().all(|line| line["failure"].is_null()), "{sessions:?}");
    }
}

const PSQL_SESSIONS: usize = 5;

fn psql_sessions(pod: &Pod) -> String {
    let query = "SELECT ssl, length(repeat('x', 1000000)) FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let session = format!(
        "psql 'host=orders port=5432 user=app dbname=postgres sslmode=require connect_timeout=5' -X -t -A -c \"{query}\""
    );
    pod.shell(&[session.as_str(); PSQL_SESSIONS].join("\n"))
}
