"""Questions about documents, answered with LlamaIndex: our embeddings find the passages, our chat model answers.

baton serve runs/tiny:sft
python -m examples.retrieval_llamaindex --documents docs "What does a seed do?"
"""

from pathlib import Path

from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from examples.passages import Answer, command, passages


def answer(
    base_url: str, model: str, documents: Path, question: str, *, key: str = "none", context: int = 2048
) -> Answer:
    """Reads the documents, and answers from the two passages nearest to the question.

    `context`: the most tokens that the model takes (`max_model_len` in /v1/models).
    """
    Settings.tokenizer = str.split  # it counts words; the default one would be fetched from the net
    chat = OpenAILike(
        model=model, api_base=base_url, api_key=key, is_chat_model=True, temperature=0.0, max_tokens=200,
        context_window=context,
    )  # fmt: skip
    embedding = OpenAILikeEmbedding(model_name=model, api_base=base_url, api_key=key)
    nodes = [TextNode(text=text, metadata={"source": name}) for name, text in passages(documents)]
    index = VectorStoreIndex(nodes, embed_model=embedding)
    found = index.as_query_engine(llm=chat, similarity_top_k=2).query(question)
    return Answer(str(found), [node.metadata["source"] for node in found.source_nodes])


if __name__ == "__main__":
    command(__doc__, answer)
