//! Text to tokens and back.

use crate::llama::Result;
use std::path::Path;
use tokenizers::Tokenizer;

/// How many tokens before an answer are enough to tell how it begins: with a
/// space, or in the middle of a word.
const CONTEXT: usize = 4;

pub struct Text(Tokenizer);

impl Text {
    /// From `tokenizer.json` of a Hugging Face folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Text(tokenizer))
    }

    pub fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
        let encoding = self.0.encode_fast(text, true).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text that the tokens after the prompt add to it.
    pub fn added(&self, tokens: &[i64], prompt: usize) -> Result<String, String> {
        let from = prompt.saturating_sub(CONTEXT);
        let before = self.decode(&tokens[from..prompt])?;
        let all = self.decode(&tokens[from..])?;
        match all.strip_prefix(&before) {
            Some(added) => Ok(added.into()),
            None => self.decode(&tokens[prompt..]),
        }
    }

    fn decode(&self, tokens: &[i64]) -> Result<String, String> {
        let ids: Vec<u32> = tokens.iter().map(|id| *id as u32).collect();
        self.0.decode(&ids, true).map_err(|error| error.to_string())
    }
}
