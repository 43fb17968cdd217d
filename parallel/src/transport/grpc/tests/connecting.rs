//! Who is connected, and why somebody is not.

use super::*;

#[test]
fn ranks_that_disagree_do_not_connect_and_say_why() {
    let errors = try_connect(2, |group| {
        group.token = format!("of rank {}", group.rank);
        group.connect_within = Duration::from_secs(2);
    });
    let errors = errors.into_iter().map(|error| error.map(drop).expect_err("refused").to_string());
    let errors = errors.collect::<Vec<_>>();
    // Who is refused first ends, so the other one may find nobody there.
    assert!(errors.iter().any(|error| error.ends_with("the token is not this run's")), "{errors:?}");
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains(&format!("rank {} at 127.0.0.1:", 1 - rank)), "{error}");
    }
}

#[test]
fn a_rank_that_cannot_be_connected_is_named() {
    let check = |there: SocketAddr, words: &[&str]| {
        let here = listen();
        let mut group = group(0, &[here.local_address(), there]);
        group.connect_within = Duration::from_secs(1);
        let begun = std::time::Instant::now();
        let error = here.connect(&group, sink().0).map(drop).expect_err("nobody there").to_string();
        assert!(begun.elapsed() < HANG / 10, "{:?}", begun.elapsed());
        let named = error.contains(&format!("rank 1 at {there}")) && error.contains("within 1s");
        assert!(named, "{error}");
        (words.iter().any(|words| error.contains(words)), error)
    };
    let gone = listen();
    let address = gone.local_address();
    drop(gone);
    let (is_said, error) = check(address, &["could not reach", "connection refused"]);
    assert!(is_said, "{error}");
    let mute = listen();
    let (is_said, error) = check(mute.local_address(), &["did not open its stream to rank 0"]);
    assert!(is_said, "{error}");
    let rude = std::net::TcpListener::bind((LOOPBACK, 0)).expect("a port");
    let address = rude.local_addr().expect("an address");
    thread::spawn(move || rude.incoming().for_each(drop));
    // The time may be over just when it has let somebody in and not yet closed the door.
    assert!((0..10).any(|_| check(address, &["connection closed", "connection reset"]).0));
    let mut group = group(2, &[address, address]);
    group.connect_within = Duration::ZERO;
    let error = listen().connect(&group, sink().0).map(drop).expect_err("no such rank").to_string();
    assert_eq!(error, "rank 2 of 2 ranks: expected a rank below 2");
}

#[test]
fn a_rank_lost_while_the_others_connect_is_named() {
    let (here, there, never) = (listen(), listen(), listen());
    let addresses = [here.local_address(), there.local_address(), never.local_address()];
    let impatient = Group { connect_within: Duration::from_secs(2), ..group(1, &addresses) };
    let there = thread::spawn(move || there.connect(&impatient, sink().0).map(drop));
    let error = here.connect(&group(0, &addresses), sink().0).map(drop).expect_err("rank 1 gave up").to_string();
    assert!(error.starts_with(&format!("rank 1 at {} was lost", addresses[1])), "{error}");
    let error = there.join().expect("no panic").expect_err("rank 2 never came").to_string();
    assert!(error.starts_with(&format!("rank 2 at {} did not open", addresses[2])), "{error}");
}

#[test]
fn the_port_is_free_after_a_close_and_after_a_drop() {
    for close in [true, false] {
        let (ranks, addresses) = pair();
        if close {
            close_all(&ranks);
        }
        drop(ranks);
        for address in addresses {
            let again = Listener::bind(address.ip(), address.port()).expect("the port is free");
            let taken = Listener::bind(address.ip(), address.port()).expect_err("now it is taken").to_string();
            assert!(taken.starts_with(&format!("could not listen on {address}: ")), "{taken}");
            drop(again);
        }
    }
}

#[test]
fn what_paces_a_rank_is_asked_for_on_its_way_to_each_other() {
    let (here, there) = (listen(), listen());
    let addresses = [here.local_address(), there.local_address()];
    let congestion = Congestion::unchecked("tortoise");
    let group = Group { congestion, connect_within: Duration::from_millis(100), ..group(0, &addresses) };
    let error = here.connect(&group, Arc::new(|_| ())).expect_err("no system has it");
    let TransportError::Unreachable { rank: 1, why, .. } = &error else { panic!("{error}") };
    let said = if cfg!(target_os = "linux") { "entity not found" } else { "here the system alone chooses" };
    assert_eq!(why, said);
}
