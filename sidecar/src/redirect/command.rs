//! The `redirect` subcommand: its flags as settings, and what it prints. Four verbs: plan, apply, verify, clean.

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use weft_proto::names;

use super::{
    apply::{apply, clean},
    finding::Outcome,
    iptables::Backend,
    plan::{plan, plan_text},
    settings::{Network, PortRange, Settings},
    verify::verify,
};

/// What `weft-sidecar redirect` can do.
#[derive(Debug, Subcommand)]
pub enum RedirectCommand {
    /// Print the rules, and change nothing.
    Plan {
        /// What to redirect.
        #[command(flatten)]
        flags: Flags,
        /// How to print them.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Put the rules in place of all that are there of Weft. Twice is the same as once.
    Apply {
        /// What to redirect.
        #[command(flatten)]
        flags: Flags,
        /// Which iptables to use.
        #[arg(long, value_enum, default_value_t, env = "WEFT_REDIRECT_BACKEND")]
        backend: Backend,
    },
    /// Prove the redirect with a real connection. To be run before the sidecar starts.
    Verify {
        /// What to redirect.
        #[command(flatten)]
        flags: Flags,
        /// Which iptables to use.
        #[arg(long, value_enum, default_value_t, env = "WEFT_REDIRECT_BACKEND")]
        backend: Backend,
    },
    /// Remove every rule of Weft.
    Clean {
        /// Which iptables to use; both by default.
        #[arg(long, value_enum, default_value_t, env = "WEFT_REDIRECT_BACKEND")]
        backend: Backend,
    },
}

/// How a plan is printed.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum Output {
    /// Documents for iptables-restore.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// What to redirect. Lists are separated by commas.
#[derive(Debug, Args)]
pub struct Flags {
    /// The user of the sidecar.
    #[arg(long, default_value_t = names::SIDECAR_UID, env = "WEFT_SIDECAR_UID")]
    sidecar_uid: u32,
    /// Where connections of the app go.
    #[arg(long, default_value_t = names::OUTBOUND_PORT)]
    outbound_port: u16,
    /// Where connections from other hosts go.
    #[arg(long, default_value_t = names::INBOUND_PORT)]
    inbound_port: u16,
    /// Probes and metrics: never redirected.
    #[arg(long, default_value_t = names::ADMIN_PORT)]
    admin_port: u16,
    /// Where DNS of the app goes.
    #[arg(long, default_value_t = names::DNS_PORT)]
    dns_port: u16,
    /// Redirect only connections of the app to these ports (80 or 8000-8999).
    #[arg(long, value_delimiter = ',', env = "WEFT_INCLUDE_OUTBOUND_PORTS")]
    include_outbound_ports: Vec<PortRange>,
    /// Leave connections of the app to these ports alone.
    #[arg(long, value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_PORTS")]
    exclude_outbound_ports: Vec<PortRange>,
    /// Redirect only connections of the app to these networks (10.0.0.0/8).
    #[arg(long, value_delimiter = ',', env = "WEFT_INCLUDE_OUTBOUND_NETWORKS")]
    include_outbound_networks: Vec<Network>,
    /// Leave connections of the app to these networks alone.
    #[arg(long, value_delimiter = ',', env = "WEFT_EXCLUDE_OUTBOUND_NETWORKS")]
    exclude_outbound_networks: Vec<Network>,
    /// Leave everything that these users send alone.
    #[arg(long, value_delimiter = ',', env = "WEFT_EXCLUDE_UIDS")]
    exclude_uids: Vec<u32>,
    /// Redirect only connections from other hosts to these ports.
    #[arg(long, value_delimiter = ',', env = "WEFT_INCLUDE_INBOUND_PORTS")]
    include_inbound_ports: Vec<PortRange>,
    /// Leave connections from other hosts to these ports alone.
    #[arg(long, value_delimiter = ',', env = "WEFT_EXCLUDE_INBOUND_PORTS")]
    exclude_inbound_ports: Vec<PortRange>,
    /// Redirect DNS too.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true, env = "WEFT_REDIRECT_DNS")]
    dns: bool,
    /// Redirect IPv6 too.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true, env = "WEFT_REDIRECT_IPV6")]
    ipv6: bool,
}

impl From<Flags> for Settings {
    fn from(flags: Flags) -> Self {
        Settings {
            sidecar_uid: flags.sidecar_uid,
            outbound_port: flags.outbound_port,
            inbound_port: flags.inbound_port,
            admin_port: flags.admin_port,
            dns_port: flags.dns_port,
            include_outbound_ports: flags.include_outbound_ports,
            exclude_outbound_ports: flags.exclude_outbound_ports,
            include_outbound_networks: flags.include_outbound_networks,
            exclude_outbound_networks: flags.exclude_outbound_networks,
            exclude_uids: flags.exclude_uids,
            include_inbound_ports: flags.include_inbound_ports,
            exclude_inbound_ports: flags.exclude_inbound_ports,
            dns: flags.dns,
            ipv6: flags.ipv6,
        }
    }
}

impl RedirectCommand {
    /// Does it, and gives what to print.
    ///
    /// # Errors
    /// What went wrong, with the way out.
    pub fn run(self) -> Result<String> {
        match self {
            RedirectCommand::Plan { flags, output: Output::Text } => plan_text(&flags.into()),
            RedirectCommand::Plan { flags, output: Output::Json } => {
                Ok(serde_json::to_string_pretty(&plan(&flags.into())?)? + "\n")
            }
            RedirectCommand::Apply { flags, backend } => {
                let applied = apply(&flags.into(), backend)?;
                let families = if applied.ipv6 { "IPv4 and IPv6" } else { "IPv4" };
                Ok(format!("redirect applied with iptables-{} for {families}\n", applied.backend.label()))
            }
            RedirectCommand::Verify { flags, backend } => {
                let findings = verify(&flags.into(), backend)?;
                let text: String = findings.iter().map(|finding| format!("{finding}\n")).collect();
                if findings.iter().any(|finding| finding.outcome == Outcome::Wrong) {
                    bail!("the redirect does not work as planned:\n{text}");
                }
                Ok(text)
            }
            RedirectCommand::Clean { backend } => {
                let removed = clean(backend)?;
                Ok(format!("redirect removed: {removed} chains of Weft\n"))
            }
        }
    }
}
