//! Strangers that were there first.

use super::*;

/// How long it is looked on while nothing may happen.
const LOOK: Duration = Duration::from_millis(300);

#[test]
fn ranks_wait_for_each_other_while_strangers_have_all_places() {
    let listeners = [listen(), listen()];
    let addresses = listeners.each_ref().map(Listener::local_address);
    // They are first in the queue of rank 1, which accepts nobody before it connects.
    let places = addresses.len() + STRANGERS_MAX;
    let strangers: Vec<_> = (0..places).map(|_| TcpStream::connect(addresses[1]).expect("it listens")).collect();
    let (connected, ready) = channel();
    let connecting = listeners.into_iter().enumerate().map(|(rank, listener)| {
        let (group, connected) = (group(rank, &addresses), connected.clone());
        thread::spawn(move || {
            let (sink, came) = sink();
            let transport = listener.connect(&group, sink).expect("the strangers go");
            connected.send(rank).expect("somebody waits");
            Rank { transport, came }
        })
    });
    let connecting: Vec<_> = connecting.collect();
    // Rank 1 has called rank 0, whose own calls find no place.
    assert!(ready.recv_timeout(LOOK).is_err(), "a rank believes to be connected that the other has not let in");
    drop(strangers);
    let ranks: Vec<Rank> = connecting.into_iter().map(|thread| thread.join().expect("no panic")).collect();
    ranks[0].transport.send(1, Bytes::from_static(b"to rank 1"));
    ranks[1].transport.send(0, Bytes::from_static(b"to rank 0"));
    ranks[1].expect(0, "to rank 1");
    ranks[0].expect(1, "to rank 0");
    close_all(&ranks);
}
