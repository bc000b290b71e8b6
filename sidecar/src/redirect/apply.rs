//! Rules into the kernel and out again. One transaction per family; applying twice is the same as once; if IPv6
//! fails, IPv4 becomes what it was. Nothing of others is touched.

use anyhow::{Context, Result, bail};

use super::{
    iptables::{Backend, Tools},
    plan::{Plan, plan},
    rules::{Family, Rules},
    settings::Settings,
};

/// What was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// The iptables that was used: `Nft` or `Legacy`.
    pub backend: Backend,
    /// IPv6 is redirected too.
    pub ipv6: bool,
}

/// Applies the redirect of a pod in the network namespace of this process.
///
/// # Errors
/// Mistakes in the settings, missing programs, a kernel that refuses. Then nothing has changed.
pub fn apply(settings: &Settings, backend: Backend) -> Result<Applied> {
    let plan = plan(settings)?;
    let tools = Tools::choose(backend)?;
    refuse_a_second_backend(&tools)?;
    apply_plan(&plan, &tools)?;
    Ok(Applied { backend: tools.backend, ipv6: plan.ipv6.is_some() })
}

/// Replaces what is present of ours with this plan.
pub(super) fn apply_plan(plan: &Plan, tools: &Tools) -> Result<()> {
    let before = tools.present(Family::Ipv4)?;
    tools.restore(Family::Ipv4, &plan.ipv4.document(&before)).context("the IPv4 rules were not applied")?;
    let Err(error) = apply_ipv6(plan, tools) else { return Ok(()) };
    let undone = tools
        .present(Family::Ipv4)
        .and_then(|present| tools.restore(Family::Ipv4, &before.document(&present)));
    let after = match undone {
        Ok(()) => "the IPv4 rules are again what they were".to_owned(),
        Err(undo) => format!("and the IPv4 rules could not be taken back ({undo:#}); run `redirect clean`"),
    };
    Err(error.context(format!(
        "the IPv6 rules were not applied; {after}. Where there is no IPv6, turn it off with `--ipv6 false`"
    )))
}

fn apply_ipv6(plan: &Plan, tools: &Tools) -> Result<()> {
    match &plan.ipv6 {
        Some(rules) => {
            let present = tools.present(Family::Ipv6)?;
            tools.restore(Family::Ipv6, &rules.document(&present))
        }
        // a system without IPv6 has none of our rules either
        None => tools
            .present(Family::Ipv6)
            .map_or(Ok(()), |present| tools.restore(Family::Ipv6, &Rules::default().document(&present))),
    }
}

/// Rules in both kinds of iptables would redirect twice.
fn refuse_a_second_backend(chosen: &Tools) -> Result<()> {
    for other in Tools::all().into_iter().filter(|other| other.backend != chosen.backend) {
        let present = [Family::Ipv4, Family::Ipv6]
            .into_iter()
            .any(|family| other.present(family).is_ok_and(|rules| !rules.is_empty()));
        if present {
            bail!(
                "rules of Weft are already there in iptables-{}, and would redirect twice with those of \
                 iptables-{}; run `weft-sidecar redirect clean` first, or choose `--backend {}`",
                other.backend.label(),
                chosen.backend.label(),
                other.backend.label()
            );
        }
    }
    Ok(())
}

/// Removes every chain of ours and every jump into one, from all tables of both families. With
/// [`Backend::Auto`] from both kinds of iptables. Gives the number of chains that were removed.
///
/// # Errors
/// If no iptables works, or a removal is refused.
pub fn clean(backend: Backend) -> Result<usize> {
    let all = match backend {
        Backend::Auto => Tools::all(),
        chosen => vec![Tools::choose(chosen)?],
    };
    if all.is_empty() {
        Tools::choose(Backend::Auto)?;
    }
    let mut removed = 0;
    for tools in all {
        for family in [Family::Ipv4, Family::Ipv6] {
            // a system without IPv6 tables has nothing to clean there
            let present = match (tools.present(family), family) {
                (Ok(present), _) => present,
                (Err(_), Family::Ipv6) => continue,
                (Err(error), Family::Ipv4) => return Err(error),
            };
            tools.restore(family, &Rules::default().document(&present)).with_context(|| {
                format!("the {} rules of iptables-{} stay", family.label(), tools.backend.label())
            })?;
            removed += present.tables.iter().map(|table| table.chains.len()).sum::<usize>();
        }
    }
    Ok(removed)
}
