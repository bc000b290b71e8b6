//! The redirect with the real iptables, nft and legacy, IPv4 and IPv6, in network namespaces; and commands in
//! namespaces of their own, as root and as an ordinary user.

#[path = "redirect/exec.rs"]
mod exec;
#[path = "redirect/pod.rs"]
mod pod;
