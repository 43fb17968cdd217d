//! Over real sockets, as it is cut in runs.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::*;
use crate::transport::congestion::Congestion;
use crate::transport::grpc::{Group, GrpcTransport, Listener};
use crate::transport::tls::Security;

/// Only a guard: nothing here takes so long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
const ELEMENTS: usize = 1 << 20;

fn connected(count: usize) -> Vec<(Arc<GrpcTransport>, Collectives)> {
    let listen = |_| Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).expect("a port of loopback");
    let listeners: Vec<_> = (0..count).map(listen).collect();
    let addresses: Vec<_> = listeners.iter().map(Listener::local_address).collect();
    let connect = |(rank, listener): (usize, Listener)| {
        let group = Group {
            rank,
            addresses: addresses.clone(),
            epoch: EPOCH,
            token: "secret".into(),
            connect_within: HANG,
            security: Security::Loopback,
            congestion: Congestion::default(),
        };
        thread::spawn(move || {
            let mailbox = Mailbox::new(Place { rank, ranks: count, epoch: EPOCH }, Arc::default());
            let transport = Arc::new(listener.connect(&group, mailbox.sink(nobody())).expect("all are here"));
            let collectives = Collectives::new(mailbox, transport.clone());
            (transport, collectives)
        })
    };
    let threads: Vec<_> = listeners.into_iter().enumerate().map(connect).collect();
    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
}

#[test]
fn several_megabytes_are_reduced_gathered_and_exchanged_over_sockets() {
    let ranks = connected(3);
    thread::scope(|scope| {
        for (rank, (transport, collectives)) in ranks.iter().enumerate() {
            scope.spawn(move || {
                let group = collectives.sub_group(&[0, 1, 2]).expect("all of them");
                let of = |rank: usize| samples::<f32>(1, rank, 3 * ELEMENTS);
                let inputs: Vec<_> = (0..3).map(of).collect();
                let mut values = inputs[rank].clone();
                group.all_reduce("sum", Reduction::Sum, &mut values).expect("all are here");
                let parts = |at: usize| [inputs[0][at], inputs[1][at], inputs[2][at]];
                let expected: Vec<_> = (0..3 * ELEMENTS).map(|at| f32::plain(Reduction::Sum, &parts(at))).collect();
                assert!(bits(&values) == bits(&expected));
                let mut all = vec![0.0; 3 * ELEMENTS];
                group.all_gather("gather", &inputs[rank][..ELEMENTS], &mut all).expect("all are here");
                assert!((0..3).all(|from| bits(&all[block(from, ELEMENTS)]) == bits(&inputs[from][..ELEMENTS])));
                group.all_to_all("exchange", &inputs[rank], &mut all).expect("all are here");
                let came = |from: usize| bits(&inputs[from][block(rank, ELEMENTS)]);
                assert!((0..3).all(|from| bits(&all[block(from, ELEMENTS)]) == came(from)));
                group.barrier("the end").expect("all are here");
                transport.close(HANG);
            });
        }
    });
}

#[test]
fn a_rank_that_is_gone_wakes_the_others_by_its_name() {
    let mut ranks = connected(3);
    let (transport, collectives) = ranks.pop().expect("three of them");
    thread::scope(|scope| {
        for (_, collectives) in &ranks {
            scope.spawn(move || {
                let group = collectives.sub_group(&[0, 1, 2]).expect("all of them");
                let error = group.all_reduce("sum", Reduction::Sum, &mut [1u8; 9]).expect_err("rank 2 is gone");
                // Whoever is woken first may end before the other has heard of rank 2.
                assert!(error.to_string().contains("rank 2 is lost: "), "{error}");
            });
        }
        drop(collectives);
        drop(transport);
    });
}
