"""Questions about documents, answered with LangChain: our embeddings find the passages, our chat model answers.

baton serve runs/tiny:sft
python -m examples.retrieval_langchain --documents docs "What does a seed do?"
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from examples.passages import passages

PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from these passages alone.\n\n{passages}"), ("user", "{question}")]
)


@dataclass(frozen=True)
class Answer:
    """The text, and the files that it was found in."""

    text: str
    sources: list[str]


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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--documents", type=Path, required=True, help="a folder of .txt and .md files")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="sft")
    given = parser.parse_args()
    found = answer(given.base_url, given.model, given.documents, given.question)
    print(f"{found.text}\n\nfrom {', '.join(found.sources)}")


if __name__ == "__main__":
    main()
