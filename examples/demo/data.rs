//! The two texts, cut into windows of bytes.

use crate::model::CONTEXT;
use tch::{Kind, Tensor};

/// The base learns the King James Bible …
pub const BASE_TEXT: &[u8] = include_bytes!("../data/kjv.txt");
/// … and the adapters turn it into Ambrose Bierce.
pub const TUNING_TEXT: &[u8] = include_bytes!("../data/devils-dictionary.txt");

/// The held-out windows, spread over the last tenth of a text.
const HELD_OUT: usize = 64;

/// A text in windows of `CONTEXT + 1` bytes that overlap by one: all but the
/// last of a window are read, all but the first predicted.
pub struct Text {
    /// (windows, CONTEXT + 1), the first nine tenths.
    train: Tensor,
    /// (HELD_OUT, CONTEXT + 1), from the last tenth.
    held_out: Tensor,
}

impl Text {
    pub fn new(bytes: &[u8]) -> Self {
        let windows = Tensor::from_slice(bytes).unfold(0, CONTEXT + 1, CONTEXT).to_kind(Kind::Int64);
        let count = windows.size()[0];
        let (train, rest) = (count * 9 / 10, count - count * 9 / 10);
        let spread: Vec<i64> = (0..HELD_OUT as i64).map(|n| train + n * rest / HELD_OUT as i64).collect();
        Text { train: windows.narrow(0, 0, train), held_out: windows.index_select(0, &Tensor::from_slice(&spread)) }
    }

    /// How many windows there are to train on.
    pub fn len(&self) -> usize {
        self.train.size()[0] as usize
    }

    /// The windows of these numbers.
    pub fn batch(&self, rows: &[usize]) -> Tensor {
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        self.train.index_select(0, &Tensor::from_slice(&rows))
    }

    /// The mean loss over the held-out windows, in nats per byte.
    pub fn held_out_loss<E>(&self, forward: impl Fn(&Tensor) -> Result<Tensor, E>) -> Result<f64, E> {
        let _no_grad = tch::no_grad_guard();
        let batches = self.held_out.split(16, 0);
        let losses = batches.iter().map(|windows| Ok(loss(windows, &forward)?.double_value(&[])));
        Ok(losses.sum::<Result<f64, E>>()? / batches.len() as f64)
    }
}

/// Mean cross-entropy of the predicted bytes, in nats per byte.
pub fn loss<E>(windows: &Tensor, forward: impl Fn(&Tensor) -> Result<Tensor, E>) -> Result<Tensor, E> {
    let logits = forward(&windows.narrow(1, 0, CONTEXT))?;
    let expected = windows.narrow(1, 1, CONTEXT).reshape([-1]);
    Ok(logits.flatten(0, 1).cross_entropy_for_logits(&expected))
}
