//! The admission webhook and controller of Weft. Not built yet: the command line says what it will do, and
//! refuses to pretend.

use std::process::ExitCode;

use clap::Parser;

/// Adds the Weft sidecar to every pod of a labelled namespace, and mirrors pods into Consul.
///
/// This program is not implemented in this version: `weft-injector` exits with code 3. It will serve the
/// Kubernetes admission webhook (`/mutate`), add the init step `weft-sidecar redirect apply` and the sidecar
/// container to pods of namespaces labelled `weft.dev/inject: enabled`, and keep the Consul catalog in step
/// with the EndpointSlices of injected pods. Until then use `weft-sidecar exec -- CMD` on a Linux host.
#[derive(Parser)]
#[command(name = "weft-injector", version)]
struct Arguments {}

fn main() -> ExitCode {
    let Arguments {} = Arguments::parse();
    eprintln!(
        "weft-injector: not implemented in this version; run workloads with `weft-sidecar exec -- CMD`, \
         or see `weft-injector --help` for what it will do"
    );
    ExitCode::from(3)
}
