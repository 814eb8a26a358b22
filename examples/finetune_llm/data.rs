//! Text to tokens to batches.

use super::Result;
use serde::Deserialize;
use std::path::Path;
use tch::{Device, Kind, Reduction, Tensor};
use tokenizers::Tokenizer;

/// The label of a token that is not to be predicted.
const IGNORED: i64 = -100;

/// Tokens, of which those from `learnt` on are predicted.
#[derive(Debug, PartialEq, Eq)]
pub struct Example {
    pub tokens: Vec<i64>,
    pub learnt: usize,
}

/// A line of a JSONL file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text { text: String },
    Pair { prompt: String, completion: String },
}

/// Turns files into examples.
pub struct Reader {
    tokenizer: Tokenizer,
    /// Ends each example of a JSONL file.
    eos: Option<i64>,
    /// Tokens that are read at most; there is one more to predict.
    length: usize,
}

impl Reader {
    /// With the tokenizer of a Hugging Face folder.
    pub fn new(folder: &Path, eos: Option<i64>, length: usize) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Reader { tokenizer, eos, length })
    }

    /// The examples of a file: lines of JSON, or a text cut into windows that
    /// overlap by one token.
    pub fn read(&self, path: &Path) -> Result<Vec<Example>> {
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| at(&error))?;
        let examples = if path.extension().is_some_and(|ending| ending == "jsonl") {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let example = |(n, line)| self.line(line).map_err(|error| at(&format!("line {}: {error}", n + 1)));
            lines.map(example).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()
        } else {
            self.windows(&text)?
        };
        match examples.is_empty() {
            true => Err(at(&"nothing to learn from").into()),
            false => Ok(examples),
        }
    }

    /// `None` where the prompt alone is too long.
    fn line(&self, line: &str) -> Result<Option<Example>> {
        let expected = "expected {\"text\": …} or {\"prompt\": …, \"completion\": …}";
        let (mut tokens, learnt) = match serde_json::from_str(line).map_err(|error| format!("{expected} ({error})"))? {
            Line::Text { text } => (self.encode(&text, true)?, 1),
            Line::Pair { prompt, completion } => {
                let mut tokens = self.encode(&prompt, true)?;
                let learnt = tokens.len().max(1);
                tokens.extend(self.encode(&completion, false)?);
                (tokens, learnt)
            }
        };
        tokens.extend(self.eos);
        tokens.truncate(self.length + 1);
        Ok((tokens.len() > learnt).then_some(Example { tokens, learnt }))
    }

    fn windows(&self, text: &str) -> Result<Vec<Example>> {
        let tokens = self.encode(text, true)?;
        let starts = (0..tokens.len().saturating_sub(1)).step_by(self.length);
        let window = |start: usize| tokens[start..tokens.len().min(start + self.length + 1)].to_vec();
        Ok(starts.map(|start| Example { tokens: window(start), learnt: 1 }).collect())
    }

    /// Token ids; with those that the tokenizer begins or ends a text with, if `special`.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }
}

/// Inputs and labels, each (batch, time), padded on the right. What is padded is
/// seen by nothing that is learnt, since attention is causal.
pub struct Batch {
    pub inputs: Tensor,
    labels: Tensor,
    /// Tokens to predict.
    pub tokens: i64,
}

impl Batch {
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>, device: Device) -> Self {
        let examples: Vec<&Example> = examples.into_iter().collect();
        let time = examples.iter().map(|example| example.tokens.len() - 1).max().unwrap_or(0);
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        for Example { tokens, learnt } in &examples {
            let padding = time + 1 - tokens.len();
            inputs.extend_from_slice(&tokens[..tokens.len() - 1]);
            inputs.extend(std::iter::repeat_n(0, padding));
            labels.extend((1..tokens.len()).map(|n| if n < *learnt { IGNORED } else { tokens[n] }));
            labels.extend(std::iter::repeat_n(IGNORED, padding));
        }
        let tokens = labels.iter().filter(|label| **label != IGNORED).count() as i64;
        let tensor = |ids: &[i64]| Tensor::from_slice(ids).view([examples.len() as i64, -1]).to_device(device);
        Batch { inputs: tensor(&inputs), labels: tensor(&labels), tokens }
    }

    /// The mean cross-entropy of the tokens to predict, in nats, from logits
    /// (batch, time, vocabulary).
    pub fn loss(&self, logits: &Tensor) -> Tensor {
        let logits = logits.flatten(0, 1).to_kind(Kind::Float);
        logits.cross_entropy_loss(&self.labels.flatten(0, 1), None::<Tensor>, Reduction::Mean, IGNORED, 0.0)
    }
}
