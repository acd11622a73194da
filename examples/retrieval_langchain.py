"""Questions about documents, answered with LangChain: our embeddings find the passages, our chat model answers.

baton serve runs/tiny:sft
python -m examples.retrieval_langchain --documents docs "What does a seed do?"
"""

from pathlib import Path

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from examples.passages import Answer, command, passages

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from these passages alone.\n\n{passages}"), ("user", "{question}")]
)


def answer(base_url: str, model: str, documents: Path, question: str, *, key: str = "none", seed: int = 0) -> Answer:
    """Reads the documents, and answers from the two passages nearest to the question."""
    # Texts, not the token ids of another model's tokenizer, are sent to be embedded.
    secret = SecretStr(key)
    embeddings = OpenAIEmbeddings(base_url=base_url, api_key=secret, model=model, check_embedding_ctx_length=False)
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(text, metadata={"source": name}) for name, text in passages(documents)])
    found = store.similarity_search(question, k=2)
    chat = ChatOpenAI(
        base_url=base_url, api_key=secret, model=model, temperature=0, seed=seed, max_completion_tokens=200
    )
    chain = PROMPT | chat
    said = chain.invoke({"passages": "\n\n".join(one.page_content for one in found), "question": question})
    return Answer(str(said.content), [one.metadata["source"] for one in found])


if __name__ == "__main__":
    command(__doc__, answer)
