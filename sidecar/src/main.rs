//! The command line of the sidecar: reads it, calls the room that does the work, turns the outcome into an exit
//! code. 0: done; 1: failed; 2: settings or usage; otherwise the exit code of the command that `exec` ran, with 126 and
//! 127 for one that cannot be executed or is not there. Where its process or namespaces cannot be made, `exec` failed.

use std::{
    ffi::OsString,
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, Subcommand, value_parser};
use hyper::Method;
use serde_json::{Value, json};
use weft_proto::{lines, names};
use weft_sidecar::{
    app::{self, App, Place},
    config::{self, Config, Written},
    redirect::{self, RedirectCommand},
};

/// Probes and metrics stand on the pod address.
const ADMIN_ON_HOST: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), names::ADMIN_PORT);
/// Many commands may run on one host: each takes a free port, which its log names.
const ADMIN_OF_EXEC: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == redirect::NAMESPACE_ARGUMENT) {
        return redirect::namespace_main();
    }
    let matches = command().get_matches();
    match matches.subcommand() {
        Some(("run", flags)) => run(flags, ADMIN_ON_HOST, Place::Host),
        Some(("exec", flags)) => run(flags, ADMIN_OF_EXEC, Place::Namespace(words(flags))),
        Some(("check", flags)) => {
            let as_json = flags.get_one::<String>("output").is_some_and(|format| format == "json");
            with_config(flags, ADMIN_ON_HOST, |config| {
                let (text, code) = app::check(&config, as_json);
                say(&text, code)
            })
        }
        Some(("redirect", flags)) => redirect(flags),
        Some(("show", flags)) => show(flags),
        Some(("drain", flags)) => ask(flags, Method::POST, "/drain", None),
        Some(("leave", flags)) => ask(flags, Method::POST, "/leave", None),
        Some(("wait", flags)) => wait(flags),
        Some(("log", flags)) => {
            let filter = flags.get_one::<String>("filter");
            ask(flags, Method::PUT, "/log", Some(&json!({ "filter": filter })))
        }
        _ => version(),
    }
}

fn command() -> Command {
    let settings = config::arguments();
    Command::new("weft-sidecar")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The sidecar of the Weft service mesh: mutual TLS, routing, retries and traces for unmodified apps.")
        .after_help(EXAMPLES)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("run")
                .about("Carry the traffic of a pod or host whose connections are redirected here")
                .args(&settings),
        )
        .subcommand(
            Command::new("exec")
                .about("Run a command in a network namespace of its own and carry its traffic; needs no root")
                .args(&settings)
                .arg(
                    Arg::new("command")
                        .value_name("CMD")
                        .help("The command and its arguments")
                        .action(ArgAction::Append)
                        .value_parser(value_parser!(OsString))
                        .trailing_var_arg(true)
                        .allow_hyphen_values(true)
                        .required(true)
                        .num_args(1..),
                ),
        )
        .subcommand(
            Command::new("check").about("Find out what would keep the sidecar from working here").args(&settings).arg(
                Arg::new("output").short('o').value_name("FORMAT").value_parser(["text", "json"]).default_value("text"),
            ),
        )
        .subcommand(RedirectCommand::augment_subcommands(
            Command::new("redirect")
                .about("Redirect the traffic of a pod to the sidecar, or stop it")
                .subcommand_required(true),
        ))
        .subcommand(
            Command::new("show").about("Show what a running sidecar knows, as JSON").arg(socket()).arg(
                Arg::new("view")
                    .required(true)
                    .value_parser(["status", "endpoints", "certificate", "config"])
                    .help("What to show"),
            ),
        )
        .subcommand(Command::new("drain").about("Make a running sidecar finish and stop").arg(socket()))
        .subcommand(
            Command::new("leave")
                .about("Make a running sidecar leave the registry, stay out of it, and go on; returns when it has left")
                .arg(socket()),
        )
        .subcommand(
            Command::new("wait").about("Wait until a sidecar is ready, also one that has not started yet").arg(socket()).arg(
                Arg::new("timeout")
                    .long("timeout")
                    .value_name("TIME")
                    .value_parser(humantime::parse_duration)
                    .default_value("60s")
                    .help("Give up after so long, with exit code 1"),
            ),
        )
        .subcommand(
            Command::new("log")
                .about("Change the log filter of a running sidecar")
                .arg(socket())
                .arg(Arg::new("filter").required(true).help("error, warn, info, debug, or a filter per module")),
        )
        .subcommand(Command::new("version").about("Print the version"))
}

const EXAMPLES: &str = "\
Examples:
  weft-sidecar exec --service web --port 8080 -- python3 -m http.server 8080
  weft-sidecar run --config /etc/weft/sidecar.yaml
  weft-sidecar redirect plan
  weft-sidecar show endpoints --admin-socket /run/weft/web.sock

Every setting is a flag, a WEFT_* variable, or a key in the file that --config names.";

fn socket() -> Arg {
    Arg::new("admin-socket")
        .long("admin-socket")
        .value_name("FILE")
        .env("WEFT_ADMIN_SOCKET")
        .value_parser(value_parser!(PathBuf))
        .required(true)
        .help("The Unix socket of the sidecar; its log names it at the start")
}

fn words(flags: &ArgMatches) -> Vec<OsString> {
    flags.get_many::<OsString>("command").into_iter().flatten().cloned().collect()
}

fn with_config(flags: &ArgMatches, admin: SocketAddr, then: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    match Config::check(&Written::read(flags, variables), admin) {
        Ok(config) => then(config),
        Err(invalid) => {
            complain(format_args!("{}", invalid.to_string().trim_end()));
            ExitCode::from(USAGE)
        }
    }
}

fn run(flags: &ArgMatches, admin: SocketAddr, place: Place) -> ExitCode {
    with_config(flags, admin, |config| match App::build(config, place) {
        Ok(app) => app.run(),
        Err(error) => {
            complain(format_args!("{error:#}"));
            ExitCode::from(FAILED)
        }
    })
}

fn redirect(flags: &ArgMatches) -> ExitCode {
    let done = RedirectCommand::from_arg_matches(flags).map_err(Into::into).and_then(RedirectCommand::run);
    match done {
        Ok(text) => say(&text, ExitCode::SUCCESS),
        Err(error) => {
            complain(format_args!("{error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

fn show(flags: &ArgMatches) -> ExitCode {
    let view = flags.get_one::<String>("view").map(String::as_str).unwrap_or_default();
    ask(flags, Method::GET, &format!("/{view}"), None)
}

fn wait(flags: &ArgMatches) -> ExitCode {
    let limit = flags.get_one::<Duration>("timeout").copied().unwrap_or_default();
    match app::wait(socket_of(flags), limit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("{}: {error:#}", socket_of(flags).display()));
            ExitCode::from(FAILED)
        }
    }
}

fn socket_of(flags: &ArgMatches) -> &Path {
    flags.get_one::<PathBuf>("admin-socket").map(PathBuf::as_path).unwrap_or(Path::new(""))
}

/// Asks a running sidecar over its Unix socket and prints the answer.
fn ask(flags: &ArgMatches, method: Method, path: &str, body: Option<&Value>) -> ExitCode {
    let socket = socket_of(flags);
    match app::ask(socket, method, path, body) {
        Ok(answer) => say(&format!("{answer:#}\n"), ExitCode::SUCCESS),
        Err(error) => {
            complain(format_args!("{}: {error:#}", socket.display()));
            ExitCode::from(FAILED)
        }
    }
}

/// The exit code says it too: a standard error that cannot be written is no panic, and one that nobody reads keeps the
/// program for a moment only.
fn complain(what: std::fmt::Arguments<'_>) {
    lines::complain(format_args!("weft-sidecar: {what}"));
}

/// Prints what was asked for. Who closes the pipe has read enough; what else cannot be written is told.
fn say(text: &str, code: ExitCode) -> ExitCode {
    let mut output = std::io::stdout();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            complain(format_args!("standard output: {error}"));
            ExitCode::from(FAILED)
        }
        _ => code,
    }
}

fn version() -> ExitCode {
    say(concat!("weft-sidecar ", env!("CARGO_PKG_VERSION"), "\n"), ExitCode::SUCCESS)
}
