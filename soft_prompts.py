"""Soft prompts with one placement, [padding][prompt][text], for training, evaluation and generation.

PEFT's own forward lays [prompt][padding][text] and ignores position ids, so that a left-padded batch answers
differently from its rows alone (huggingface/peft#1093), and rows can not be flattened. Here the ids of a row begin with
VIRTUAL_TOKEN ids, which are replaced by the prompt's vectors once the batch is embedded. What is saved is PEFT's.
"""

import torch
from peft import PeftModelForCausalLM

from collators import VIRTUAL_TOKEN


class SoftPromptModel(PeftModelForCausalLM):
    """A base model with a soft prompt, `prompt` (num_virtual_tokens, hidden_size), as its only trainable part."""

    @property
    def prompt(self) -> torch.nn.Parameter:
        return self.prompt_encoder[self.active_adapter].embedding.weight

    @property
    def virtual_tokens(self) -> list[int]:
        """The ids that a row has to begin with."""
        return [VIRTUAL_TOKEN] * len(self.prompt)

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed a batch, with the prompt in the place of its virtual tokens.

        Args:
            input_ids: (B, L), VIRTUAL_TOKEN where a vector of the prompt goes.
            position_ids: (B, L), counted from 0 in each row, so that they number the prompt's vectors too.

        Returns:
            (B, L, hidden_size), in the dtype of the word embeddings.
        """
        virtual = input_ids == VIRTUAL_TOKEN
        words = self.get_base_model().get_input_embeddings()(input_ids.clamp(min=0))
        # no index of the virtual tokens: counting them would wait for the GPU
        vectors = torch.nn.functional.embedding(position_ids.clamp(0, len(self.prompt) - 1), self.prompt)
        return torch.where(virtual.unsqueeze(-1), vectors.to(words.dtype), words)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        """The base model's forward on a batch that is flattened (`position_ids`) or padded (`attention_mask`)."""
        numbers = position_ids if position_ids is not None else attention_mask.cumsum(dim=1) - 1
        return self.base_model(
            inputs_embeds=self.embed(input_ids, numbers),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )

    @torch.inference_mode()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Generate behind left-padded prompts whose texts begin with virtual tokens; returns prompts and answers."""
        embeds = self.embed(input_ids, attention_mask.cumsum(dim=1) - 1)
        answers = self.base_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return torch.cat([input_ids, answers], dim=1)
