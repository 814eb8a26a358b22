//! Keys and values that are kept, so that a text grows without its beginning
//! being computed again.

use super::Config;
use tch::{Device, Kind, Tensor};

/// The keys and values of one text in every layer.
#[derive(Debug)]
pub struct Cache {
    /// Of each layer, (1, heads, capacity, head_dim).
    layers: Vec<[Tensor; 2]>,
    length: i64,
}

impl Cache {
    /// Room for `capacity` tokens, taken at once.
    pub fn new(config: &Config, capacity: usize, kind: Kind, device: Device) -> Self {
        let sizes = [1, config.key_value_heads(), capacity as i64, config.head_dim()];
        let room = || Tensor::empty(sizes, (kind, device));
        Cache { layers: (0..config.num_hidden_layers).map(|_| [room(), room()]).collect(), length: 0 }
    }

    /// How many tokens it holds.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// Writes those of the next tokens, (1, heads, time, head_dim). Answers the
    /// layer's keys and values of all tokens up to them.
    pub(super) fn extend(&self, layer: usize, k: &Tensor, v: &Tensor) -> [Tensor; 2] {
        let [keys, values] = &self.layers[layer];
        [(keys, k), (values, v)].map(|(room, new)| {
            let time = new.size()[2];
            room.narrow(2, self.length, time).copy_(new);
            room.narrow(2, 0, self.length + time)
        })
    }

    pub(super) fn advance(&mut self, time: i64) {
        self.length += time;
    }
}

/// The next tokens of one text.
pub struct Part<'a> {
    pub tokens: &'a [i64],
    /// What was computed for the tokens before.
    pub cache: &'a mut Cache,
}

impl Part<'_> {
    pub(super) fn time(&self) -> i64 {
        self.tokens.len() as i64
    }
}
