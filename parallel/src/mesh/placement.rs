//! Where the ranks of a mesh are.
//!
//! A tensor group exchanges activations four times a layer and a step waits for each: across machines that is the
//! step. So its ranks belong into one machine; stages and replicas may lie apart.

use super::{Axis, Mesh};

/// A group whose ranks are on several machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// Of which axis.
    pub axis: Axis,
    /// Its ranks.
    pub ranks: Vec<usize>,
    /// Their machines, each once, by its first rank.
    pub hosts: Vec<String>,
}

impl std::fmt::Display for Crossing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the {} group of ranks {:?} is on several machines: {}", self.axis, self.ranks, self.hosts.join(", "))
    }
}

/// The groups of an axis that cross machines; `hosts` are the ranks' machines, in rank order.
///
/// # Panics
/// When there is not one host for each rank.
#[must_use]
pub fn crossings(mesh: Mesh, axis: Axis, hosts: &[String]) -> Vec<Crossing> {
    assert_eq!(hosts.len(), mesh.ranks(), "a host for every rank of {mesh}");
    let crossing = |ranks: Vec<usize>| {
        let mut names: Vec<String> = Vec::new();
        for &rank in &ranks {
            if !names.contains(&hosts[rank]) {
                names.push(hosts[rank].clone());
            }
        }
        (names.len() > 1).then_some(Crossing { axis, ranks, hosts: names })
    };
    mesh.groups(axis).into_iter().filter_map(crossing).collect()
}

/// Which place becomes which rank, so that as few tensor groups as possible cross machines: entry r is the place, an
/// index into `hosts`, of rank r. Each machine first fills groups of its own; what is left over of machines fills the last
/// groups together. Otherwise places keep their order, machines that of their first place.
///
/// # Panics
/// When there is not one place for each rank.
#[must_use]
pub fn arrange(mesh: Mesh, hosts: &[String]) -> Vec<usize> {
    assert_eq!(hosts.len(), mesh.ranks(), "a place for every rank of {mesh}");
    let mut machines: Vec<(&String, Vec<usize>)> = Vec::new();
    for (place, host) in hosts.iter().enumerate() {
        match machines.iter_mut().find(|(name, _)| *name == host) {
            Some((_, places)) => places.push(place),
            None => machines.push((host, vec![place])),
        }
    }
    let tensor = mesh.size(Axis::Tensor);
    let (mut whole, mut left) = (Vec::new(), Vec::new());
    for (_, places) in machines {
        let (own, rest) = places.split_at(places.len() / tensor * tensor);
        whole.extend_from_slice(own);
        left.extend_from_slice(rest);
    }
    whole.extend(left);
    whole
}
