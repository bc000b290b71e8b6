//! Servers that lose their state just between two blocking queries of a sidecar: the next one waits for an index of
//! before, at an agent that never went, and nobody tells. It is noticed all the same.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{app, get, leader, sidecar, time_until};

/// Twice the time in which it is looked for; much less than the five minutes of a blocking query.
const MOST: Duration = Duration::from_secs(66);

#[test]
fn state_that_is_lost_behind_an_agent_is_noticed() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one, two) = (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("two"));
    let (first, host) = (mesh.network.pod("server"), mesh.network.pod("host"));
    let mut server = Consul::server(&first, &[&first], "");
    let agent = Consul::agent(&host, &[&first], "log_level = \"debug\"");
    until("there is a leader", || leader(&agent).is_some());
    let (_one, _two) = (app(&one, "one", 8080), app(&two, "two", 8080));
    let register = |server: &Consul<'_>, id: &str, address: &str, tag: &str| {
        server.register("orders", id, address, 8080, json!({"Tags": [tag]}));
    };
    let address = one.ipv4().to_string();
    // A history that servers without state do not reach soon.
    (0..200).for_each(|number| server.put("history", &number.to_string()));
    register(&server, "one", &address, "before");
    let web = sidecar(&mesh, &client, "web", &agent.address(), &[]);
    until("it is called", || get(&client, "http://orders/") == "200 one");
    let answers = || {
        let asked =
            |line: &&str| line.contains("Request finished") && line.contains("/service/orders?stale&index=");
        agent.process().log().lines().filter(asked).count()
    };

    // A change ends the blocking query, and the sidecar reads the answer only when all is over.
    let before = answers();
    let mut round = 0;
    until("a query waits", || {
        round += 1;
        register(&server, "one", &address, &format!("round {round}"));
        answers() > before
    });
    (0..50).for_each(|_| weft_tests::pause());
    let before = answers();
    web.process.signal(Signal::SIGSTOP);
    register(&server, "one", &address, "last");
    until("the query is answered", || answers() > before);
    server.stop();
    server.wipe();
    server.start();
    until("there is a leader again", || leader(&agent).is_some());
    register(&server, "one", &address, "new");
    web.process.signal(Signal::SIGCONT);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    (0..100).for_each(|_| weft_tests::pause());
    register(&server, "two", &two.ipv4().to_string(), "new");
    let noticed = time_until("it is noticed", MOST, || get(&client, "http://orders/") == "200 two");
    assert!(web.process.log().contains("its index went back"), "{}", web.process.log());
    println!("noticed after {noticed:.1?}");
}
