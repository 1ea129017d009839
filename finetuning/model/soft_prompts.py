"""Soft prompts with one layout, [padding][prompt][text], for training, evaluation and generation.

PEFT's own forward makes [prompt][padding][text] and ignores position ids: a left-padded batch answers differently from
its rows alone (huggingface/peft#1093), and rows cannot be flattened. Here the ids of a row begin with VIRTUAL_TOKEN
ids, and the prompt's vectors take their place when the batch is embedded. The saved adapter is a plain PEFT adapter.
"""

import torch
from peft import PeftModelForCausalLM

VIRTUAL_TOKEN = -1  # input ids that stand for the vectors of a soft prompt


class SoftPromptModel(PeftModelForCausalLM):
    """A base model with a soft prompt, `prompt` (num_virtual_tokens, hidden_size), as its only trainable part."""

    @property
    def prompt(self) -> torch.nn.Parameter:
        return self.prompt_encoder[self.active_adapter].embedding.weight

    @property
    def virtual_tokens(self) -> list[int]:
        """The ids that every row begins with."""
        return [VIRTUAL_TOKEN] * self.active_peft_config.num_virtual_tokens

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt as this process has it: PEFT looks it up in the prompt, which FSDP may have sharded."""
        return self.prompt_encoder[adapter_name].embedding.weight.detach()

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed a batch, with the prompt's vectors in place of the virtual tokens.

        Args:
            input_ids: (B, L), VIRTUAL_TOKEN in place of each vector of the prompt.
            position_ids: (B, L), counted from 0 in each row, so they also number the prompt's vectors.

        Returns:
            (B, L, hidden_size), in the dtype of the word embeddings.
        """
        virtual = input_ids == VIRTUAL_TOKEN
        words = self.get_base_model().get_input_embeddings()(input_ids.clamp(min=0))
        # Each position looks its vector up: selecting those of the virtual tokens would wait for the GPU. It is the
        # module that looks up, because ZeRO-3 gathers a parameter only in its module's own forward.
        lookup = self.prompt_encoder[self.active_adapter].embedding
        vectors = lookup(position_ids.clamp(0, lookup.num_embeddings - 1))
        return torch.where(virtual.unsqueeze(-1), vectors.to(words.dtype), words)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        """Run the base model on a flattened batch (with `position_ids`) or a padded one (with `attention_mask`)."""
        numbers = position_ids if position_ids is not None else attention_mask.cumsum(dim=1) - 1
        return self.base_model(
            inputs_embeds=self.embed(input_ids, numbers),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )

    @torch.inference_mode()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Answer left-padded prompts, each of which begins with virtual tokens; returns prompts and answers."""
        embeds = self.embed(input_ids, attention_mask.cumsum(dim=1) - 1)
        answers = self.base_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return torch.cat([input_ids, answers], dim=1)
