"""What every engine that samples is asked, whichever it is: what it holds, what its settings say, which releases go."""
