//! The command line of the sidecar.

use std::{env, process::ExitCode};

use clap::{Parser, Subcommand};
use weft_sidecar::redirect::{self, RedirectCommand};

#[derive(Debug, Parser)]
#[command(name = "weft-sidecar", version, about = "The data plane of the Weft service mesh.")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Redirect the traffic of a pod to the sidecar, or stop it.
    #[command(subcommand)]
    Redirect(RedirectCommand),
}

fn main() -> ExitCode {
    if env::args_os().nth(1).is_some_and(|verb| verb == redirect::NAMESPACE_ARGUMENT) {
        return redirect::namespace_main();
    }
    let Verb::Redirect(command) = Arguments::parse().verb;
    match command.run() {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("weft-sidecar: {error:#}");
            ExitCode::FAILURE
        }
    }
}
