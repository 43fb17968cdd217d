//! The order of a sum is that of the ranks, on a network where the order of arrival is any.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::transport::simulated::{Network, Quality};

const RANKS: usize = 4;
const QUALITY: Quality = Quality { delay_max: Duration::from_millis(50), bytes_per_s: 1e9 };

/// The sum of every rank, and the order in which the others' pieces came to each.
fn summed(seed: u64, inputs: &[Vec<f32>], cuts: Cuts) -> (Vec<Vec<f32>>, Vec<Vec<usize>>) {
    let network = Network::new(RANKS, QUALITY, seed);
    let came: Vec<_> = (0..RANKS).map(|_| Arc::new(Mutex::new(Vec::new()))).collect();
    let open = |rank: usize| {
        let mailbox = Mailbox::new(Place { rank, ranks: RANKS, epoch: EPOCH }, Arc::default());
        let (sink, came) = (mailbox.sink(nobody()), came[rank].clone());
        let noting = move |incoming: Incoming| {
            if let Incoming::Message { from, .. } = &incoming {
                lock(&came).push(*from);
            }
            sink(incoming);
        };
        network.open(rank, Arc::new(noting));
        Collectives::cut(mailbox, Arc::new(network.end(rank)), cuts)
    };
    let ranks: Vec<_> = (0..RANKS).map(open).collect();
    let running = AtomicUsize::new(RANKS);
    let sums = thread::scope(|scope| {
        let sum = |(collectives, input): (&Collectives, &Vec<f32>)| {
            let (collectives, mut values, running) = (collectives.clone(), input.clone(), &running);
            scope.spawn(move || {
                let group = collectives.sub_group(&[0, 1, 2, 3]).expect("all of them");
                let done = group.all_reduce("sum", Reduction::Sum, &mut values);
                running.fetch_sub(1, Ordering::SeqCst);
                done.map(|()| values)
            })
        };
        let threads: Vec<_> = ranks.iter().zip(inputs).map(sum).collect();
        while running.load(Ordering::SeqCst) > 0 {
            match network.next() {
                Some(at) => network.advance(at),
                None => thread::yield_now(),
            }
        }
        threads.into_iter().map(|thread| thread.join().expect("no panic").expect("all agree")).collect()
    });
    (sums, came.iter().map(|came| lock(came).clone()).collect())
}

fn inputs(seed: u64, elements: usize) -> Vec<Vec<f32>> {
    let value = |random: &mut Random| (random.next() as i32) as f32 / (1u64 << random.below(20)) as f32;
    let input = |rank: usize| {
        let mut random = Random::new(seed ^ (rank as u64) << 32);
        (0..elements).map(|_| value(&mut random)).collect()
    };
    (0..RANKS).map(input).collect()
}

fn sum_in(order: &[usize], inputs: &[Vec<f32>]) -> Vec<f32> {
    let at = |at: usize| order.iter().map(|&rank| inputs[rank][at]).reduce(|sum, part| sum + part).expect("ranks");
    (0..inputs[0].len()).map(at).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn all_members_have_the_bits_of_the_sum_in_rank_order(seed: u64, elements in 1usize..300) {
        let inputs = inputs(seed, elements);
        let expected = sum_in(&[0, 1, 2, 3], &inputs);
        let (sums, _) = summed(seed, &inputs, SMALL);
        prop_assert!(sums.iter().all(|sum| bits(sum) == bits(&expected)));
    }
}

/// The control: members that added what came as it came would have other bits than each other.
#[test]
fn sums_in_the_order_of_arrival_differ_between_members() {
    let direct = Cuts { piece_bytes: 1 << 20, direct_bytes_max: 1 << 20 };
    let inputs = inputs(3, 200);
    let (sums, came) = summed(3, &inputs, direct);
    assert!(sums.iter().all(|sum| bits(sum) == bits(&sum_in(&[0, 1, 2, 3], &inputs))));
    let as_it_came = |rank: usize| bits(&sum_in(&[&[rank], &came[rank][..]].concat(), &inputs));
    assert!((1..RANKS).any(|rank| as_it_came(rank) != as_it_came(0)), "{came:?}");
}
