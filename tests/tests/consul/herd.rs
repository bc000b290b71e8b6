//! A sidecar that watches many services, all of whose questions fail at the same moment: it does not ask them all
//! again at once.

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, pause, until};

use super::{
    questions::Questions,
    world::{app, get, leader, sidecar},
};

const SERVICES: usize = 50;
/// Some ten a second are meant to be asked again, and some ten that were answered to wait. Without that there are twice
/// as many as this.
const MOST_PER_SECOND: usize = 40;

#[test]
fn questions_that_fail_together_are_not_repeated_together() {
    if !can_run(&Questions::needs()) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one) = (mesh.network.pod("client"), mesh.network.pod("one"));
    let (first, host) = (mesh.network.pod("server"), mesh.network.pod("host"));
    let mut server = Consul::server(&first, &[&first], "");
    let agent = Consul::agent(&host, &[&first], "");
    until("there is a leader", || leader(&agent).is_some());
    let _one = app(&one, "one", 8080);
    for number in 0..SERVICES {
        let name = format!("s{number}");
        server.register(&name, &name, &one.ipv4().to_string(), 8080, json!({}));
    }
    let web = sidecar(&mesh, &client, "web", &agent.address(), &[]);
    for number in 0..SERVICES {
        assert_eq!(get(&client, &format!("http://s{number}.weft/")), "200 one");
    }
    // Their first questions are over, and those that wait have begun to.
    (0..50).for_each(|_| pause());
    let questions = Questions::at(&host);
    server.stop();
    until("it is missed", || web.process.log().contains("what is known stays in use"));
    (0..100).for_each(|_| pause());
    server.start();
    until("there is a leader again", || leader(&agent).is_some());
    until("it is asked again", || web.process.log().contains("answers again"));
    (0..200).for_each(|_| pause());
    let questions = questions.count();
    println!("questions for {SERVICES} services since the server went: {questions}");
    assert!(questions.all >= 2 * SERVICES && questions.busiest <= MOST_PER_SECOND, "a herd: {questions}");
    assert_eq!(get(&client, "http://s0.weft/"), "200 one");
}
